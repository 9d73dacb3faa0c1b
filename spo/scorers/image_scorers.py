"""What can score finished images, by name.

A scorer is named in `scorers`: one of `SCORERS`, or the dotted path "module:factory" of a callable that
takes `device` and the options in `scorer_options.<name>` and returns an `ImageScorer`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from spo.errors import UserError
from spo.hub import check_file, model_file
from spo.plugins import find
from spo.scorers import check_clip
from spo.scorers.aesthetic import load_aesthetic
from spo.scorers.clipscore import load_clipscore
from spo.scorers.hpsv2 import load_hpsv2, load_hpsv2_1
from spo.scorers.imagereward import load_imagereward
from spo.scorers.open_clip import check_open_clip
from spo.scorers.pickscore import load_pickscore
from spo.scorers.step_aware_images import load_step_aware


class ImageScorer(Protocol):
    """Scores finished images for their prompts."""

    title: str  # as papers name it
    scale: float  # papers print `scale` times the score

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores (n,) on the CPU, float32, not scaled, of image i for prompt i; higher is better."""


# Of a scorer here, an option of the same name means the same thing: `check_image_scorer` relies on it.
SCORERS: dict[str, Callable[..., ImageScorer]] = {
    "pickscore": load_pickscore,
    "hpsv2": load_hpsv2,
    "hpsv2.1": load_hpsv2_1,
    "aesthetic": load_aesthetic,
    "clipscore": load_clipscore,
    "imagereward": load_imagereward,
    "step_aware_clip": load_step_aware,
}


def load_image_scorer(name: str, options: Mapping[str, Any], device: torch.device) -> ImageScorer:
    """The scorer that `name` names, with its weights on `device`.

    Raises UserError naming `scorers` or `scorer_options.<name>` where it cannot be loaded.
    """
    factory, _ = _bind(name, options, device)
    return factory(device=device, **options)


def check_image_scorer(name: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for what is wrong with a scorer, as far as its small files tell."""
    _, values = _bind(name, options, torch.device("cpu"))
    if name not in SCORERS:
        return
    section = f"scorer_options.{name}"
    if "model" in values:
        check_open_clip(values["model"], values["checkpoint"], section)
    elif "checkpoint" in values:
        check_file(values["checkpoint"], f"{section}.checkpoint")
    if "head" in values:
        check_file(values["head"], f"{section}.head")
    if "backbone" in values:
        check_clip(values["backbone"], values["processor"], section)
    if "tokenizer" in values:
        model_file(values["tokenizer"], "tokenizer_config.json", f"{section}.tokenizer")


def _bind(
    name: str, options: Mapping[str, Any], device: torch.device
) -> tuple[Callable[..., ImageScorer], dict[str, Any]]:
    """The factory, and all of its arguments, the default ones too."""
    factory = find(name, SCORERS, "scorers")
    try:
        bound = inspect.signature(factory).bind(device=device, **options)
    except TypeError as error:
        raise UserError(f"scorer_options.{name}: it takes other options: {error}") from error
    if name in SCORERS:
        for option, default in factory.__kwdefaults__.items():
            if type(options.get(option, default)) is not type(default):
                raise UserError(
                    f"scorer_options.{name}.{option}: {options[option]!r} is none like {default!r}."
                )
    bound.apply_defaults()
    return factory, bound.arguments
