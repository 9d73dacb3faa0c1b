"""Human Preference Score v2 and v2.1: Wu et al., arXiv 2306.09341."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spo.evaluation.images import unit_pixels
from spo.scorers.open_clip import OpenClip, load_open_clip

_HUB = "hf://xswu/HPSv2"


class HPSv2:
    """cos(image, text) of a CLIP that was trained on human preferences.

    Images are prepared as by the package hpsv2 1.2.0, which is not how open_clip evaluates: nothing is
    cut off. An image is scaled to [0, 1], resized (bicubic) so that its longer side fits, and padded
    with black around the middle to a square. The package computes in mixed precision, this in fp32.
    """

    scale = 100.0

    def __init__(self, title: str, clip: OpenClip, antialias: bool) -> None:
        self.title = title
        self._clip, self._antialias = clip, antialias

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        image = self._clip.image_features([self.prepare(image) for image in images])
        return (image * self._clip.text_features(prompts)).sum(dim=-1).cpu()

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixels (3, S, S) of an image."""
        to = self._clip.preparation
        return to.normalise(fit_square(unit_pixels(image), to.size, self._antialias))


def fit_square(pixels: Tensor, size: int, antialias: bool) -> Tensor:
    """(3, H, W) -> (3, size, size): the longer side resized to `size`, the shorter padded with 0."""
    height, width = pixels.shape[1:]
    ratio = size / max(height, width)
    shape = (round(height * ratio), round(width * ratio))
    pixels = F.interpolate(pixels[None], shape, mode="bicubic", antialias=antialias)[0]
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    return F.pad(pixels, (left, size - shape[1] - left, top, size - shape[0] - top))


def load_hpsv2(
    device: torch.device,
    *,
    model: str = "ViT-H-14",
    checkpoint: str = f"{_HUB}/HPS_v2_compressed.pt",
    antialias: bool = True,
) -> HPSv2:
    """HPSv2; `model` and `checkpoint` as in `load_open_clip`, UserError where they cannot be loaded.

    `antialias`: as the official code does with torchvision 0.17 or newer. Older ones, current when the
    scores of the paper were computed, resize tensors without.
    """
    clip = load_open_clip(model, checkpoint, "scorer_options.hpsv2", device)
    return HPSv2("HPSv2", clip, antialias)


def load_hpsv2_1(
    device: torch.device,
    *,
    model: str = "ViT-H-14",
    checkpoint: str = f"{_HUB}/HPS_v2.1_compressed.pt",
    antialias: bool = True,
) -> HPSv2:
    """HPSv2.1: the same with newer weights; options as of `load_hpsv2`."""
    clip = load_open_clip(model, checkpoint, "scorer_options.hpsv2.1", device)
    return HPSv2("HPSv2.1", clip, antialias)
