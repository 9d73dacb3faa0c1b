"""The SPM in training: a fresh one or a checkpoint, and the pass that gradients flow through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spo.hub import resolve_file
from spo.preference.loss import PairFeatures
from spo.scorers.clip import clip_config, load_clip
from spo.scorers.step_aware_clip import StepAwareCLIP, fresh_step_aware_clip, load_step_aware_clip


def build_spm(
    backbone: str, init_from: str, seed: int, gradient_checkpointing: bool
) -> StepAwareCLIP:
    """An SPM in fp32, on the CPU, to train all of; UserError where it cannot be loaded."""
    if init_from:
        key = "preference.init_from"
        path = resolve_file(init_from, key)
        spm = load_step_aware_clip(path, clip_config(backbone), key).float()
    else:
        spm = fresh_step_aware_clip(load_clip(backbone), seed)
    if gradient_checkpointing:
        spm.model.gradient_checkpointing_enable({"use_reentrant": False})
    return spm.requires_grad_(True).train()


class PairScorer(nn.Module):
    """Pixels, timesteps and prompts of pairs -> features, in one forward pass for DDP."""

    def __init__(self, spm: StepAwareCLIP) -> None:
        super().__init__()
        self.spm = spm

    def forward(self, pixels: Tensor, timesteps: Tensor, input_ids: Tensor) -> PairFeatures:
        """Features, fp32, of normalised pixels (n, 2, 3, S, S), timesteps (n,), token ids (n, L)."""
        image = self.spm.image_features(pixels.flatten(0, 1), timesteps.repeat_interleave(2))
        return PairFeatures(
            image=image.float().unflatten(0, (-1, 2)),
            text=self.spm.text_features(input_ids).float(),
            scale=self.spm.model.logit_scale.exp(),
        )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision of the SPM, whose weights stay in fp32; nothing where `dtype` is fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
