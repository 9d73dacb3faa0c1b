"""The hidden quality of images, which the labels of the preference data prefer, and scorers by it.

GradSPO never sees the quality: it labels the pairs that the preference model learns from, and it
measures at the end whether the images have become better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spo.tiny_world.reading import Reading, read_captions, read_scenes


def hidden_quality(images: Tensor) -> Tensor:
    """Returns the quality (n,), 0 to 10, of images (n, 3, H, W) in [-1, 1]: 10 x mean of parts."""
    return 10 * quality_parts(images).mean(1)


def quality_parts(images: Tensor) -> Tensor:
    """Returns saturation, sharpness and cleanness (n, 3), each in [0, 1] and blind to the layout."""
    seen = read_scenes(images)
    return torch.stack([_saturation(seen), _sharpness(seen), _cleanness(seen)], dim=1)


def _saturation(seen: Reading) -> Tensor:
    """Returns the mean HSV saturation of figure and ground: 0 at 0.35, 1 at 0.9."""
    colours = torch.stack([seen.figure, seen.ground])
    high, low = colours.amax(-1), colours.amin(-1)
    return _ramp(((high - low) / high.clamp(min=1e-3)).mean(0), 0.35, 0.9)


def _sharpness(seen: Reading) -> Tensor:
    """Returns the steepest change of the outline over two pixels, as a share of the contrast."""
    across = (seen.cover[:, :, 2:] - seen.cover[:, :, :-2]).abs()[:, 1:-1]
    down = (seen.cover[:, 2:] - seen.cover[:, :-2]).abs()[:, :, 1:-1]
    # The smallest outline has at least two dozen pixels.
    steepest = torch.maximum(across, down).flatten(1).topk(24).values.mean(1)
    return torch.where(seen.contrast > 0.1, _ramp(steepest, 0.5, 1.0), 0.0)


def _cleanness(seen: Reading) -> Tensor:
    """Returns 1 for flat areas without variation, 0 at a standard deviation of 0.06."""
    squares = (seen.residual**2).mean(1)
    rms = ((squares * seen.flat).sum((1, 2)) / seen.flat.sum((1, 2)).clamp(min=1)).sqrt()
    return _ramp(rms, 0.06, 0.01)


def _ramp(values: Tensor, zero: float, one: float) -> Tensor:
    return ((values - zero) / (one - zero)).clamp(0, 1)


def shows_caption(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns 1 or 0 (n,) for images (n, 3, SIDE, SIDE) that show all or not all of their prompts."""
    shown = [str(caption) for caption in read_captions(images)]
    return torch.tensor([float(a == b) for a, b in zip(shown, prompts, strict=True)])


@dataclass(frozen=True)
class PixelScorer:
    """A scorer for `scripts/evaluate.py` that reads images (n, 3, H, W) in [-1, 1] and prompts."""

    title: str
    scale: float
    of_pixels: Callable[[Tensor, Sequence[str]], Tensor]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return self.of_pixels(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, prompts)


def quality(device: torch.device) -> PixelScorer:
    """Returns the scorer of the hidden quality, 0 to 10."""
    return PixelScorer("Hidden quality", 1.0, lambda pixels, _: hidden_quality(pixels))


def faithfulness(device: torch.device) -> PixelScorer:
    """Returns the scorer of whether an image shows its prompt, in percent."""
    return PixelScorer("Faithful", 100.0, shows_caption)
