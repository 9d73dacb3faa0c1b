"""What can score candidates.

A scorer is named in `preference.scorer`: one of `SCORERS`, or the dotted path "module:factory" of a
callable that takes `preference.kwargs` and `device` and returns a `Scorer`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerBase,
)

from spo.data.token_lengths import readable
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import PREFETCH, model_file, resolve_file
from spo.plugins import find
from spo.scorers.step_aware_clip import StepAwareCLIP, load_step_aware_clip, text_features


class Scorer(Protocol):
    """Scores images for prompts; higher is better."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """What `score` needs to know of each prompt, (B, ...); called once per prompt."""

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        """Scores (n,) of images (n, 3, H, W), nominally in [-1, 1], decoded at `timestep`."""


@dataclass(frozen=True)
class ImagePreparation:
    """From images in [-1, 1] to a CLIP's pixels, differentiable torch operations in fp32."""

    size: int  # of the shorter side, and of the square that is cut out
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of_processor(cls, processor: CLIPImageProcessor) -> ImagePreparation:
        """The sizes and statistics of a transformers image processor."""
        return cls(
            processor.size["shortest_edge"],
            tuple(processor.image_mean),
            tuple(processor.image_std),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 3, size, size): resize, centre crop, to [0, 1], clamp, normalise."""
        height, width = images.shape[-2:]
        ratio = self.size / min(height, width)
        shape = (round(height * ratio), round(width * ratio))
        images = F.interpolate(images.float(), shape, mode="bicubic", align_corners=False)
        top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        return self.normalise((images / 2 + 0.5).clamp(0, 1))

    def stretched(self, images: Tensor) -> Tensor:
        """As above, but to [0, 1] and clamp first, then resize straight to the square.

        What a step-aware preference model is trained on (SPO, arXiv 2406.04314).
        """
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        shape = (self.size, self.size)
        images = F.interpolate(images, shape, mode="bicubic", align_corners=False)
        return self.normalise(images.clamp(0, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to zero mean and unit variance over CLIP's training data."""
        mean, std = (
            _per_channel(tuple(v), images.device, images.dtype) for v in (self.mean, self.std)
        )
        return (images - mean) / std


@cache  # to make a tensor of numbers on a GPU waits for it
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


class CLIPInputs:
    """Tokenizer and image preparation of a CLIP, from a Hub id or folder."""

    def __init__(self, processor: str, section: str = "preference") -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
            self.image_processor = CLIPImageProcessor.from_pretrained(processor)
        except LOAD_ERRORS as error:
            raise _cannot_load(f"{section}.processor", processor, error) from error
        self.prepare = ImagePreparation.of_processor(self.image_processor)

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded and truncated to the tokenizer's own length L."""
        encoded = self.tokenizer(
            readable(prompts), padding="max_length", truncation=True, return_tensors="pt"
        )
        return encoded.input_ids


class StepAwareScorer:
    """The step-aware preference model."""

    def __init__(self, spm: StepAwareCLIP, inputs: CLIPInputs, device: torch.device) -> None:
        self._spm, self.inputs, self._device = spm.to(device), inputs, device
        self._dtype = spm.model.visual_projection.weight.dtype

    def compile(self) -> None:
        """Compile the vision tower, layer by layer: they share their code, so one is compiled."""
        for layer in self._spm.model.vision_model.encoder.layers:
            layer.compile()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return self._spm.text_features(self.inputs.tokenize(prompts).to(self._device))

    @torch.no_grad()
    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        pixels = self.inputs.prepare(images).to(self._dtype)
        timesteps = torch.full((len(images),), timestep, device=images.device)
        return self._spm.score(pixels, timesteps, prompt_features).float()


class PickScoreScorer:
    """Plain PickScore (Kirstain et al., arXiv 2305.01569), which ignores the timestep."""

    def __init__(self, clip: CLIPModel, inputs: CLIPInputs, device: torch.device) -> None:
        self._clip = clip.requires_grad_(False).eval().to(device)
        self.inputs, self._device = inputs, device
        self._dtype = clip.visual_projection.weight.dtype

    def compile(self) -> None:
        """Compile the vision tower, layer by layer."""
        for layer in self._clip.vision_model.encoder.layers:
            layer.compile()

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return text_features(self._clip, self.inputs.tokenize(prompts).to(self._device))

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        return self.score_pixels(self.inputs.prepare(images), prompt_features)

    @torch.no_grad()
    def score_pixels(self, pixels: Tensor, prompt_features: Tensor) -> Tensor:
        """Scores (n,) of pixels (n, 3, S, S) that are prepared already."""
        pooled = self._clip.vision_model(pixels.to(self._dtype)).pooler_output
        features = self._clip.visual_projection(pooled)
        cosine = F.cosine_similarity(features, prompt_features, dim=-1)
        return (self._clip.logit_scale.exp() * cosine).float()


@dataclass(frozen=True)
class ScorerSource:
    """Where a scorer comes from; `config.preference` explains each."""

    scorer: str
    checkpoint: str
    backbone: str
    processor: str
    dtype: str
    kwargs: Mapping[str, Any]

    @classmethod
    def of_config(cls, preference: ConfigDict) -> ScorerSource:
        source = cls(**preference.to_dict())
        paths = {
            name: os.path.expanduser(getattr(source, name)) for name in ("backbone", "processor")
        }
        return replace(source, **paths)


def _step_aware_clip(source: ScorerSource, device: torch.device) -> Scorer:
    checkpoint = resolve_file(source.checkpoint, "preference.checkpoint")
    spm = load_step_aware_clip(checkpoint, clip_config(source.backbone))
    return StepAwareScorer(spm.to(DTYPES[source.dtype]), CLIPInputs(source.processor), device)


def _pickscore(source: ScorerSource, device: torch.device) -> Scorer:
    clip = load_clip(source.backbone).to(DTYPES[source.dtype])
    return PickScoreScorer(clip, CLIPInputs(source.processor), device)


SCORERS = {"step_aware_clip": _step_aware_clip, "pickscore": _pickscore}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_source(source: ScorerSource) -> None:
    """Raise UserError for what is wrong with `source` as far as its small files tell."""
    find(source.scorer, SCORERS, "preference.scorer")
    if source.dtype not in DTYPES:
        raise UserError(f"preference.dtype: {source.dtype!r} is none of {', '.join(DTYPES)}.")
    if source.scorer == "step_aware_clip":
        resolve_file(source.checkpoint, "preference.checkpoint")
    if source.scorer in SCORERS:
        check_clip(source.backbone, source.processor)


def check_clip(backbone: str, processor: str, section: str = "preference") -> None:
    """Raise UserError for what is wrong with a CLIP and its processor, by their small files.

    `section` of the config names them.
    """
    model_file(backbone, "config.json", f"{section}.backbone")
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        model_file(processor, name, f"{section}.processor")
    clip_config(backbone, section)
    CLIPInputs(processor, section)


def load_clip(backbone: str, section: str = "preference") -> CLIPModel:
    """A CLIP with its weights, in fp32 on the CPU; UserError where it cannot be loaded."""
    try:
        return CLIPModel.from_pretrained(backbone, dtype=torch.float32)
    except LOAD_ERRORS as error:
        raise _cannot_load(f"{section}.backbone", backbone, error) from error


def load_scorer(source: ScorerSource, device: torch.device) -> Scorer:
    """The scorer that `source` names, on `device`; UserError where it cannot be loaded."""
    factory = find(source.scorer, SCORERS, "preference.scorer")
    if source.scorer in SCORERS:
        return factory(source, device)
    try:
        inspect.signature(factory).bind(device=device, **source.kwargs)
    except TypeError as error:
        raise UserError(f"preference.kwargs: {source.scorer} takes other ones: {error}") from error
    return factory(device=device, **source.kwargs)


def tokenizers_of(scorer: Scorer) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer of a scorer that is a CLIP, by what messages call the scorer."""
    inputs = getattr(scorer, "inputs", None)
    return {"preference model": inputs.tokenizer} if isinstance(inputs, CLIPInputs) else {}


def clip_config(backbone: str, section: str = "preference") -> CLIPConfig:
    """The architecture of a CLIP; UserError where it cannot be read."""
    try:
        return CLIPConfig.from_pretrained(backbone)
    except LOAD_ERRORS as error:
        raise _cannot_load(f"{section}.backbone", backbone, error) from error


def _cannot_load(key: str, name: str, error: Exception) -> UserError:
    return UserError(
        f"{key}: {name!r} cannot be loaded ({first_line(error)}); to download it: {PREFETCH}"
    )
