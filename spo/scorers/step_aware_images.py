"""The step-aware preference model on finished images: SPO, arXiv 2406.04314."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from spo.evaluation.images import unit_pixels
from spo.hub import resolve_file
from spo.scorers import CLIPInputs, StepAwareScorer, clip_config
from spo.scorers.step_aware_clip import load_step_aware_clip

_SECTION = "scorer_options.step_aware_clip"


class StepAwareAtZero:
    """What the scorer of the candidates says of a finished image, that is at t = 0."""

    title, scale = "SPM (t = 0)", 1.0

    def __init__(self, scorer: StepAwareScorer, device: torch.device) -> None:
        self._scorer, self._device = scorer, device

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        features = self._scorer.encode_prompts(prompts).split(1)
        tensors = [unit_pixels(image).to(self._device)[None] * 2 - 1 for image in images]
        pairs = zip(tensors, features, strict=True)  # one by one, as their sizes may differ
        return torch.cat([self._scorer.score(image, text, 0) for image, text in pairs]).cpu()


def load_step_aware(
    device: torch.device,
    *,
    checkpoint: str = (
        "hf://SPO-Diffusion-Models/Step-Aware_Preference_Models/"
        "sd-v1-5_step-aware_preference_model.bin"
    ),
    backbone: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
) -> StepAwareAtZero:
    """The SPM in `checkpoint`, with the architecture of the CLIP `backbone`.

    `checkpoint` is a path or hf://user/repo/file, the others are Hub ids or folders; UserError where
    they cannot be loaded.
    """
    key = f"{_SECTION}.checkpoint"
    spm = load_step_aware_clip(resolve_file(checkpoint, key), clip_config(backbone, _SECTION), key)
    return StepAwareAtZero(
        StepAwareScorer(spm.float(), CLIPInputs(processor, _SECTION), device), device
    )
