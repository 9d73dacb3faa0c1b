"""Scorers: images (or latents) and prompts -> numbers, for candidates and for finished images.

A scorer is named in `preference.scorer` (training) or in `scorers` (evaluation): an entry of `SCORERS`,
or the dotted path "module:factory" of a callable that takes `device` and the options in
`preference.kwargs` or `scorer_options.<name>`. Training and evaluation take whatever it returns: a
`Scorer`, which scores tensors at a timestep, with features computed once per prompt, or an
`ImageScorer`, which scores PIL images for prompts and knows no timestep.
"""

import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spo.errors import UserError
from spo.hub import check_file, model_file, resolve_file
from spo.plugins import find
from spo.scorers.clip import check_clip, weight_dtype
from spo.scorers.pixels import to_pil, unit_pixels

# The factories, imported on use: only some need open_clip, which takes seconds to import. A factory
# takes `device`, the config `section` that errors name, and options. An option of the same name means
# the same thing in all factories: `check_scorer` relies on it.
SCORERS = {
    "step_aware_clip": "spo.scorers.step_aware_clip:load_step_aware_scorer",
    "pickscore": "spo.scorers.pickscore:load_pickscore",
    "hpsv2": "spo.scorers.open_clip:HPSv2",
    "hpsv2.1": "spo.scorers.open_clip:HPSv2_1",
    "aesthetic": "spo.scorers.open_clip:Aesthetic",
    "clipscore": "spo.scorers.open_clip:CLIPScore",
    "imagereward": "spo.scorers.imagereward:ImageReward",
    "latent_reward": "spo.scorers.latent_reward_scorer:load_latent_reward_scorer",
}
# The scorers whose options are keys of `preference`; the options of all others are `preference.kwargs`.
_PREFERENCE_KEYS = {
    "step_aware_clip": ("checkpoint", "backbone", "processor", "dtype"),
    "pickscore": ("backbone", "processor", "dtype"),
}


class Scorer:
    """Scores images for prompts; higher is better. Subclasses define `encode_prompts` and `score`."""

    title = ""  # as papers name the scorer; empty: its name in the config
    scale = 1.0  # papers print `scale` times the score
    # or "latents": `score` gets the noisy latents, not decoded images. Known before anything loads: if
    # the config names a function, it has this attribute, too.
    looks_at = "images"
    # The tokenizers that truncate prompts, each by the name of its model in messages.
    tokenizers: Mapping[str, PreTrainedTokenizerBase] = {}

    def compile(self) -> None:
        """Compiles the networks with torch.compile; raises UserError if the scorer cannot."""
        name = self.title or type(self).__name__
        raise UserError(f"compile.scorer: {name} has no method `compile`; set it to False.")

    def channels_last(self) -> None:
        """Lays out convolutions channels last, if the scorer is made of these."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Returns features (B, ...), all that `score` needs of each prompt; called once per prompt.

        If they are no tensor, `features[rows]` must select them by a tensor of indices (n,).
        """
        raise NotImplementedError

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        """Returns scores (n,) of images (n, 3, H, W), nominally in [-1, 1], decoded at `timestep`.

        `prompt_features` (n, ...) has the row of each image's prompt. If `looks_at` is "latents",
        `images` are the candidates' noisy latents (n, C, h, w), drawn at `timestep`.
        """
        raise NotImplementedError

    def image_features(self, images: Sequence[Image.Image]) -> Tensor | None:
        """Returns unit-norm features (n, D) of finished images; None if the scorer has none."""
        return None

    @torch.no_grad()
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Returns scores (n,) of finished images, float32, not scaled, on the CPU."""
        if self.looks_at == "latents":
            raise UserError(f"scorers: {self.title} looks at latents, not at finished images.")
        features, scores = self.encode_prompts(prompts), []
        # One by one, because their sizes may differ.
        for image, row in zip(images, features.split(1), strict=True):
            pixels = unit_pixels(image).to(features.device)[None] * 2 - 1
            scores.append(self.score(pixels, row, timestep=0))
        return torch.cat(scores).float().cpu()


@dataclass(frozen=True)
class PromptRows:
    """Prompts as features: `rows[index]` selects prompts by a tensor of indices (n,)."""

    prompts: tuple[str, ...]

    def __getitem__(self, index: Tensor) -> "PromptRows":
        return PromptRows(tuple(self.prompts[i] for i in index.tolist()))


class ImageScorer(Scorer):
    """Base of scorers that know only PIL images and prompts: subclasses define `score_images`."""

    def encode_prompts(self, prompts: Sequence[str]) -> PromptRows:
        return PromptRows(tuple(prompts))

    def score(self, images: Tensor, prompt_features: PromptRows, timestep: int) -> Tensor:
        """Returns scores (n,), times `scale`, of images (n, 3, H, W); `timestep` plays no part.

        Scaled, because `sample.threshold` compares softmax probabilities of scores, which would hardly
        differ for plain cosines; CLIPs are trained on cosines times about 100, too.
        """
        scores = self.scale * self.score_images(to_pil(images), prompt_features.prompts)
        return scores.to(images.device)


@dataclass(frozen=True)
class ScorerSource:
    """Names a scorer, and the keyword arguments of its factory."""

    name: str
    options: Mapping[str, Any]
    section: str  # of the config, with the options
    key: str  # of the config, with the name


def image_scorer(name: str, options: Mapping[str, Any]) -> ScorerSource:
    """Returns a scorer in `config.scorers`, with its entry of `config.scorer_options`."""
    return ScorerSource(name, options, f"scorer_options.{name}", "scorers")


def candidate_scorer(scorer: str, kwargs: Mapping[str, Any], **paths: str) -> ScorerSource:
    """Returns the scorer that `config.preference` names; config/base.py explains each key."""
    if scorer not in _PREFERENCE_KEYS:
        return ScorerSource(scorer, kwargs, "preference.kwargs", "preference.scorer")
    options = {key: os.path.expanduser(paths[key]) for key in _PREFERENCE_KEYS[scorer]}
    return ScorerSource(scorer, options, "preference", "preference.scorer")


def looks_at(source: ScorerSource) -> str:
    """Returns "images" or "latents", whichever the scorer looks at; loads nothing."""
    return getattr(_factory(source), "looks_at", "images")


def options_of(source: ScorerSource) -> Mapping[str, Any]:
    """Returns a scorer's options, defaults included; raises UserError for a wrong one."""
    return _bind(source, torch.device("cpu"))[1].arguments


def load_scorer(source: ScorerSource, device: torch.device) -> Scorer:
    """Returns a scorer with its weights on `device`; raises UserError that names the config key."""
    factory, bound = _bind(source, device)
    scorer = factory(*bound.args, **bound.kwargs)
    if not isinstance(scorer, Scorer):
        raise UserError(f"{source.key}: a {type(scorer).__name__} is no spo.scorers.Scorer.")
    if scorer.looks_at != looks_at(source):
        raise UserError(
            f"{source.key}: {source.name} makes a scorer that looks at {scorer.looks_at}; name its "
            f"class, or give the function the attribute looks_at = {scorer.looks_at!r}."
        )
    scorer.title = scorer.title or source.name
    return scorer


def check_scorer(
    source: ScorerSource, family: str = "", base: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Raises UserError for a wrong name or option, as far as small files tell.

    `family` and `base`, the configs of the base model's parts, are needed for a scorer of candidates.
    Downloads `preference.checkpoint`, so that the processes of a run find it in the cache.
    """
    _, bound = _bind(source, torch.device("cpu"))
    if source.name not in SCORERS:
        return
    values, section = bound.arguments, source.section
    if source.name == "latent_reward":
        from spo.scorers.latent_reward_scorer import check_latent_reward

        if base is None:
            raise UserError(
                f"{source.key}: {source.name} looks at latents, not at finished images."
            )
        check_latent_reward(values, section, family, base)
    elif "model" in values:
        from spo.scorers.open_clip import find_open_clip

        find_open_clip(values["model"], values["checkpoint"], section)
    elif "checkpoint" in values:
        look_up = resolve_file if section == "preference" else check_file
        look_up(values["checkpoint"], f"{section}.checkpoint")
    if "head" in values:
        check_file(values["head"], f"{section}.head")
    if "dtype" in values:
        weight_dtype(values["dtype"], section)
    if "backbone" in values:
        check_clip(values["backbone"], values["processor"], section)
    if "tokenizer" in values:
        model_file(values["tokenizer"], "tokenizer_config.json", f"{section}.tokenizer")


def named_files(source: ScorerSource) -> dict[str, str]:
    """Returns the texts among a scorer's options, defaults included, as they may name its files.

    With the file of an open_clip tag in its place, and the code of a scorer that is not of `SCORERS`.
    """
    values = options_of(source) | source.options
    found = {}
    for key, value in values.items():
        every = value if isinstance(value, list | tuple) else [value]
        found |= {f"{key}.{i}" if i else key: v for i, v in enumerate(every) if isinstance(v, str)}
    if source.name not in SCORERS:
        module = sys.modules.get(source.name.partition(":")[0])
        found["code"] = getattr(module, "__file__", None) or ""
    elif "model" in values:
        from spo.scorers.open_clip import find_open_clip

        *_, found["checkpoint"] = find_open_clip(values["model"], values["checkpoint"], "")
    return found


def _factory(source: ScorerSource) -> Callable:
    return find(SCORERS.get(source.name, source.name), SCORERS, source.key)


def _bind(source: ScorerSource, device: torch.device) -> tuple[Callable, inspect.BoundArguments]:
    """Returns the factory and all of its arguments, defaults included."""
    name, section, options = source.name, source.section, source.options
    factory = _factory(source)
    given = {"device": device} | ({"section": section} if name in SCORERS else {})
    try:
        bound = inspect.signature(factory).bind(**given, **options)
    except TypeError as error:
        raise UserError(f"{section}: {name} takes other options: {error}") from error
    except ValueError as error:  # some builtins
        reason = f"{name} does not tell its options; name a function or class in Python"
        raise UserError(f"{source.key}: {reason}.") from error
    for option, value in options.items() if name in SCORERS else ():
        default = bound.signature.parameters[option].default
        if type(value) is not type(default):
            raise UserError(f"{section}.{option}: {value!r} is none like {default!r}.")
    bound.apply_defaults()
    return factory, bound
