"""The step-aware preference model (SPM): a CLIP whose vision tower also sees the timestep.

Architecture and checkpoints: SPO, arXiv 2406.04314. Timestep embedding and adaptive layer norm come
from DiT, arXiv 2212.09748. Module names follow the published checkpoints.
"""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from spo.errors import UserError, in_one_line
from spo.scorers.clip import CLIPInputs, clip_config, weight_dtype
from spo.scorers.pickscore import CLIPScorer
from spo.scorers.state_dicts import read_state_dict


class TimestepEmbedder(nn.Module):
    """Timesteps (n,) -> embeddings (n, width): sinusoids, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sinusoids = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        return self.mlp(self.sinusoids(timesteps).to(self.mlp[0].weight.dtype))


def _modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return hidden * (1 + scale) + shift


class StepAwareEncoderLayer(CLIPEncoderLayer):
    """A CLIP vision layer modulated by the timestep embedding."""

    def __init__(self, config) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, hidden: Tensor, timestep_embedding: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(timestep_embedding)[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        normed = _modulate(self.layer_norm1(hidden), shift_a, scale_a)
        attended, _ = self.self_attn(normed, attention_mask=None)
        hidden = hidden + gate_a * attended
        return hidden + gate_m * self.mlp(_modulate(self.layer_norm2(hidden), shift_m, scale_m))


class StepAwareCLIP(nn.Module):
    """A CLIP with a step-aware vision tower, which scores (image, prompt, timestep)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.model = CLIPModel(config)
        vision = self.model.vision_model
        width = vision.config.hidden_size
        layers = (StepAwareEncoderLayer(vision.config) for _ in vision.encoder.layers)
        vision.encoder.layers = nn.ModuleList(layers)
        vision.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.model.t_embedder = TimestepEmbedder(width)

    def image_features(self, pixels: Tensor, timesteps: Tensor) -> Tensor:
        """Returns unit fp32 features (n, D) of normalised pixels (n, 3, S, S) and timesteps (n,)."""
        embedding = self.model.t_embedder(timesteps)
        vision = self.model.vision_model
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers:
            hidden = layer(hidden, embedding)
        shift, scale = vision.adaLN_modulation(embedding).chunk(2, dim=-1)
        pooled = _modulate(vision.post_layernorm(hidden[:, 0]), shift, scale)
        features = self.model.visual_projection(pooled).float()
        return features / features.norm(dim=-1, keepdim=True)

    def score(self, pixels: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Returns exp(logit_scale) cos(image, text), (n,) fp32, for unit-norm text features (n, D)."""
        cosine = (self.image_features(pixels, timesteps) * text).sum(dim=-1)
        return self.model.logit_scale.float().exp() * cosine


def fresh_step_aware_clip(clip: CLIPModel, seed: int) -> StepAwareCLIP:
    """Returns an SPM to train, with the weights of `clip` and, at first, the scores of `clip`.

    Linear weights of the modulation are zero, biases shift 0, scale 0 and gate 1; the timestep
    embedder starts at N(0, 0.02).
    """
    spm = StepAwareCLIP(clip.config)
    spm.model.load_state_dict(clip.state_dict(), strict=False)
    vision, embedder = spm.model.vision_model, spm.model.t_embedder.mlp
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in (embedder[0], embedder[2]):
            linear.weight.copy_(0.02 * torch.randn(linear.weight.shape, generator=generator))
            linear.bias.zero_()
        for module in (vision, *vision.encoder.layers):
            module.adaLN_modulation[1].weight.zero_()
            module.adaLN_modulation[1].bias.zero_()
        for layer in vision.encoder.layers:
            # Shift, scale, gate of the attention, then of the MLP: the gates are rows 2 and 5.
            layer.adaLN_modulation[1].bias.view(6, -1)[[2, 5]] = 1
    return spm


def load_step_aware_clip(
    checkpoint: Path | str, config: CLIPConfig, key: str = "preference.checkpoint"
) -> StepAwareCLIP:
    """Returns the SPM in a .safetensors or .bin state dict, in eval mode on the CPU.

    Raises UserError that names the config `key` and the file, also for a missing or unknown tensor.
    """
    weights = read_state_dict(checkpoint, key)
    # Constant buffers that old transformers saved; today's models do not have them.
    weights = {k: v for k, v in weights.items() if not k.endswith("embeddings.position_ids")}
    # Parameters are built without memory: the weights are assigned, not copied.
    with init_empty_weights():
        spm = StepAwareCLIP(config)
    try:
        spm.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        fit = f"does not fit {key.rpartition('.')[0]}.backbone as a step-aware preference model"
        raise UserError(f"{key}: {checkpoint} {fit}: {in_one_line(error)}") from error
    return spm.requires_grad_(False).eval()


class StepAwareScorer(CLIPScorer):
    """The step-aware preference model as a scorer; it scores finished images at timestep 0."""

    title = "SPM (t = 0)"

    def __init__(self, spm: StepAwareCLIP, inputs: CLIPInputs, device: torch.device) -> None:
        super().__init__(spm.model, inputs, device)  # `spm.model` holds all of its weights
        self.spm = spm

    @torch.no_grad()
    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        pixels = self.inputs.prepare(images).to(self.clip.visual_projection.weight.dtype)
        timesteps = torch.full((len(images),), timestep, device=images.device)
        return self.spm.score(pixels, timesteps, prompt_features)


def load_step_aware_scorer(
    device: torch.device,
    section: str,
    *,
    checkpoint: str = (
        "hf://SPO-Diffusion-Models/Step-Aware_Preference_Models/"
        "sd-v1-5_step-aware_preference_model.bin"
    ),
    backbone: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    dtype: str = "float32",
) -> StepAwareScorer:
    """Returns the SPM in a path or hf://user/repo/file; the CLIP `backbone` gives its architecture."""
    architecture = clip_config(backbone, section)
    spm = load_step_aware_clip(checkpoint, architecture, f"{section}.checkpoint")
    spm = spm.to(weight_dtype(dtype, section))
    return StepAwareScorer(spm, CLIPInputs(processor, section), device)
