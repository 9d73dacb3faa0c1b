"""The latent reward model as a scorer: loaded, checked against the base model, told prompts once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME as SCHEDULER
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spo.command_line.values import expand, require_number
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import model_file
from spo.method.ddim import ddim_scheduler
from spo.models.decoder import pixels_per_latent
from spo.models.families import FAMILIES
from spo.models.loading import read_json
from spo.models.weights import fetch
from spo.scorers import Scorer
from spo.scorers.clip import weight_dtype
from spo.scorers.latent_reward import GUIDANCE, LatentRewardModel, PromptText, tokenize
from spo.scorers.latent_reward_folder import LatentRewardFolder


class LatentRewardScorer(Scorer):
    """The latent reward model as a scorer of a rollout's noisy candidates."""

    title = "LRM"
    looks_at = "latents"

    def __init__(
        self,
        model: LatentRewardModel,
        tokenizers: Sequence[PreTrainedTokenizerBase],
        device: torch.device,
    ) -> None:
        self.model, self.device = model.requires_grad_(False).eval().to(device), device
        names = ("reward model", "second text encoder of the reward model")
        self.tokenizers = dict(zip(names, tokenizers, strict=False))
        self.empty = self.encode_prompts([""]) if model.guidance_scale != 1 else None

    def compile(self) -> None:
        """Compiles the UNet's blocks."""
        for block in (*self.model.unet.down_blocks, self.model.unet.mid_block):
            block.compile()

    def channels_last(self) -> None:
        """Lays out the UNet channels last."""
        self.model.unet.to(memory_format=torch.channels_last)

    def tokenize(self, prompts: Sequence[str]) -> list[Tensor]:
        """Returns token ids (n, L) of each text encoder."""
        return tokenize(self.tokenizers.values(), prompts)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptText:
        return self.model.encode_text([ids.to(self.device) for ids in self.tokenize(prompts)])

    @torch.no_grad()
    def score(self, images: Tensor, prompt_features: PromptText, timestep: int) -> Tensor:
        """Returns scores (n,) of noisy latents (n, C, h, w) for the text of their prompts."""
        timesteps = torch.full((len(images),), timestep, device=images.device)
        return self.model.score(images, timesteps, prompt_features, self.empty)


def check_latent_reward(
    values: Mapping[str, Any], section: str, family: str, configs: Mapping[str, Any]
) -> None:
    """Raises UserError unless an LRM is whole and judges latents such as the base model makes.

    `values` are the options of `load_latent_reward_scorer`, `configs` those of the base model's parts.
    """
    require_number(f"{section}.guidance_scale", values["guidance_scale"], *GUIDANCE)
    weight_dtype(values["dtype"], section)
    key, checkpoint = f"{section}.checkpoint", values["checkpoint"]
    LatentRewardFolder(checkpoint, key).check_family(family, configs["unet"])
    base = values["base"] or FAMILIES[family].base_model
    try:
        trained_on = ddim_scheduler(_base_config(base, f"scheduler/{SCHEDULER}", section))
    except ValueError as error:
        raise UserError(f"{section}.base: {base!r} cannot be used: {error}.") from error
    judges = ddim_scheduler(configs["scheduler"])
    same_noise = torch.equal(trained_on.alphas_cumprod, judges.alphas_cumprod)
    kinds = [each.config.prediction_type for each in (trained_on, judges)]
    if not same_noise or kinds[0] != kinds[1]:
        what = "other betas" if not same_noise else f"prediction type {kinds[1]}, not {kinds[0]}"
        raise UserError(
            f"{key}: {checkpoint!r} was trained on the noise of {base!r}, but pretrained.model has "
            f"{what}; name an LRM trained on it, and its base model by {section}.base."
        )


def _base_config(base: str, name: str, section: str) -> dict[str, Any]:
    key = f"{section}.base"
    return read_json(model_file(expand(base), name, key), key)


def load_latent_reward_scorer(
    device: torch.device,
    section: str,
    *,
    checkpoint: str = "hf://casiatao/LRM/lrm_sd15",
    base: str = "",
    guidance_scale: float = 7.5,
    guide_stages: bool = False,
    dtype: str = "float32",
) -> LatentRewardScorer:
    """Returns the LRM in a folder, user/repo or hf://user/repo/folder.

    `base` is the base model that it was trained on, Hub id or folder, for its tokenizers; empty: the
    published one of its family. Raises UserError if a part is missing or does not fit.
    """
    folder, key = LatentRewardFolder(checkpoint, f"{section}.checkpoint"), f"{section}.base"
    is_sdxl = "text_encoder_2" in folder.configs()
    base = expand(base) or FAMILIES["sdxl" if is_sdxl else "sd15"].base_model
    names = ("tokenizer", "tokenizer_2") if is_sdxl else ("tokenizer",)
    try:
        root = fetch(base, names, key)
        tokenizers = [
            AutoTokenizer.from_pretrained(root / name, trust_remote_code=False) for name in names
        ]
    except LOAD_ERRORS as error:
        raise UserError(f"{key}: no tokenizer of {base!r} ({first_line(error)}).") from error
    model = folder.load(
        weight_dtype(dtype, section),
        guidance_scale=guidance_scale,
        guide_stages=guide_stages,
        pixels_per_latent=pixels_per_latent(_base_config(base, "vae/config.json", section)),
    )
    for tokenizer, encoder in zip(tokenizers, model.text_encoders, strict=True):
        own, limit = encoder.config.vocab_size, encoder.config.max_position_embeddings
        if not 5 <= len(tokenizer) <= own:  # transformers is content with a folder without files
            raise UserError(
                f"{key}: {base!r} has {len(tokenizer)} tokens, but the reward model knows {own}; name "
                "the base model that it was trained on."
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return LatentRewardScorer(model, tokenizers, device)


load_latent_reward_scorer.looks_at = "latents"  # known before anything loads
