"""Scorers of the tiny world's images, read off their pixels: `scripts/evaluate.py` takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spo.tiny_world.quality import quality as hidden_quality
from spo.tiny_world.reading import read_captions


@dataclass(frozen=True)
class PixelScorer:
    """A score of images (n, 3, H, W) in [-1, 1] and their prompts."""

    title: str
    scale: float
    of_pixels: Callable[[Tensor, Sequence[str]], Tensor]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return self.of_pixels(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, prompts)


def quality(device: torch.device) -> PixelScorer:
    """The hidden quality, from 0 to 10, that labelled the preference data."""
    return PixelScorer("Hidden quality", 1.0, lambda pixels, _: hidden_quality(pixels))


def faithfulness(device: torch.device) -> PixelScorer:
    """1 where size, colour, shape and background are those of the prompt, else 0; given in percent."""

    def as_asked(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        shown = [str(caption) for caption in read_captions(pixels)]
        return torch.tensor([float(a == b) for a, b in zip(shown, prompts, strict=True)])

    return PixelScorer("Faithful", 100.0, as_asked)
