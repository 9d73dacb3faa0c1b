"""Human Preference Score v2 and v2.1: Wu et al., arXiv 2306.09341."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from spo.scorers.open_clip import OpenClipScorer
from spo.scorers.pixels import unit_pixels


class HPSv2(OpenClipScorer):
    """cos(image, text) of a CLIP that was trained on human preferences.

    Images are prepared as in the package hpsv2 1.2.0: scaled to [0, 1], resized (bicubic) so that the
    longer side fits, and padded with black on both sides to a square; open_clip's own evaluation crops
    instead. The package computes in mixed precision, this class in fp32.

    `model` and `checkpoint` as in `OpenClipScorer`. `antialias`: True as the official code with
    torchvision 0.17 or newer; older versions, current when the paper's scores were computed, resize
    tensors without antialiasing.
    """

    title, scale = "HPSv2", 100.0

    def __init__(
        self,
        device: torch.device,
        section: str,
        *,
        model: str = "ViT-H-14",
        checkpoint: str = "hf://xswu/HPSv2/HPS_v2_compressed.pt",
        antialias: bool = True,
    ) -> None:
        super().__init__(device, section, model, checkpoint)
        self._antialias = antialias

    def prepare(self, image: Image.Image) -> Tensor:
        """Returns the pixels (3, S, S) of an image."""
        to = self.preparation
        return to.normalise(fit_square(unit_pixels(image), to.size, self._antialias))


def fit_square(pixels: Tensor, size: int, antialias: bool) -> Tensor:
    """(3, H, W) -> (3, size, size): the longer side resized to `size`, the shorter padded with 0."""
    height, width = pixels.shape[1:]
    ratio = size / max(height, width)
    shape = (round(height * ratio), round(width * ratio))
    pixels = F.interpolate(pixels[None], shape, mode="bicubic", antialias=antialias)[0]
    top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
    return F.pad(pixels, (left, size - shape[1] - left, top, size - shape[0] - top))


class HPSv2_1(HPSv2):
    """HPSv2 with newer weights."""

    title = "HPSv2.1"

    def __init__(
        self,
        device: torch.device,
        section: str,
        *,
        model: str = "ViT-H-14",
        checkpoint: str = "hf://xswu/HPSv2/HPS_v2.1_compressed.pt",
        antialias: bool = True,
    ) -> None:
        super().__init__(device, section, model=model, checkpoint=checkpoint, antialias=antialias)
