"""Scorers without their weights, made from config files: random on a real device, or shapes only."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from spo.command_line.config_files import REPO_ROOT
from spo.command_line.values import expand
from spo.errors import UserError
from spo.hub import is_hub_id, repo_of
from spo.models.single_file import is_single_file, read_single_file
from spo.scorers import Scorer, ScorerSource, load_scorer, looks_at, options_of
from spo.scorers.clip import CLIPInputs, clip_config, weight_dtype
from spo.scorers.latent_reward import LatentRewardModel, down_path, feature_width
from spo.scorers.latent_reward_folder import HEADS, LatentRewardFolder
from spo.scorers.latent_reward_scorer import LatentRewardScorer
from spo.scorers.pickscore import PickScore
from spo.scorers.step_aware_clip import StepAwareCLIP, StepAwareScorer

ARCHITECTURES = REPO_ROOT / "assets" / "architectures"
# The tokens themselves cost nothing; this tokenizer pads to the length that a model wants.
_TOKENIZER = str(REPO_ROOT / "assets" / "tiny" / "clip")
_SCORERS = {
    "step_aware_clip": (StepAwareCLIP, StepAwareScorer),
    "pickscore": (CLIPModel, PickScore),
}
META = torch.device("meta")


def local_folder(name: str, published: str, key: str) -> str:
    """Returns a local folder, that of a file's architecture, or the published one for a Hub id."""
    if Path(name).is_dir():
        return name
    if is_single_file(name):
        return str(read_single_file(name, key).configs)
    if not is_hub_id(name):
        raise UserError(f"{key}: {name!r} is neither a folder nor a Hub id user/name.")
    return str(ARCHITECTURES / published)


def unloaded_scorer(source: ScorerSource, device: torch.device, family: str) -> Scorer:
    """Returns a scorer without its weights; on the meta device a user's own costs nothing."""
    if source.name == "latent_reward":
        return _unloaded_latent_reward(options_of(source), device, family)
    if source.name not in _SCORERS:
        return _FreeScorer(looks_at(source)) if device == META else load_scorer(source, device)
    network, scorer = _SCORERS[source.name]
    config = clip_config(local_folder(source.options["backbone"], "clip_h", "preference.backbone"))
    with device:
        clip = network(config)
    inputs = CLIPInputs(_TOKENIZER)
    inputs.tokenizer.model_max_length = config.text_config.max_position_embeddings
    inputs.prepare = replace(inputs.prepare, size=config.vision_config.image_size, resized=None)
    dtype = weight_dtype(source.options["dtype"], "preference")
    return scorer(clip.to(dtype).requires_grad_(False).eval(), inputs, device)


def _unloaded_latent_reward(
    options: Mapping[str, Any], device: torch.device, family: str
) -> LatentRewardScorer:
    key = "preference.kwargs.checkpoint"
    place = local_folder(repo_of(expand(options["checkpoint"])), family, key)
    folder = LatentRewardFolder(place, key)
    unet, *texts = folder.configs().values()
    width = texts[-1].get("projection_dim", 512)  # transformers' default
    if Path(place, HEADS).is_file():
        width = len(folder.heads().visual_projection)
    with device:
        network = down_path(unet)
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)
        encoders = [
            kind(kind.config_class.from_dict(config))
            for kind, config in zip(kinds, texts, strict=False)
        ]
        visual = nn.Linear(feature_width(unet), width, bias=False)
        # SDXL's second text encoder has a projection of its own.
        text = None if len(encoders) == 2 else nn.Linear(texts[0]["hidden_size"], width, bias=False)
    for part in (network, *encoders):
        nn.Module.to(part, weight_dtype(options["dtype"], "preference.kwargs"))
    scales = options["guidance_scale"], options["guide_stages"]
    model = LatentRewardModel(network, encoders, visual, text, *scales)
    return LatentRewardScorer(model, [tokenizer_for(encoder) for encoder in encoders], device)


def tokenizer_for(encoder: nn.Module) -> CLIPTokenizer:
    """Returns a tokenizer that pads as a text encoder wants."""
    length = encoder.config.max_position_embeddings
    return CLIPTokenizer.from_pretrained(_TOKENIZER, model_max_length=length)


class _FreeScorer(Scorer):
    """Stands for a user's own scorer, which may not run on shapes only."""

    def __init__(self, looks_at: str) -> None:
        self.looks_at = looks_at

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.empty(len(prompts), 1, device=META)

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        return torch.empty(len(images), device=META)
