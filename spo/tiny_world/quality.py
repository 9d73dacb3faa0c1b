"""The hidden quality of an image: what the labels of the preference data prefer.

GradSPO never sees it: it labels the pairs that the preference model learns from, and it says at the
end whether the images have become better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo.tiny_world.reading import Reading, read


def quality(images: Tensor) -> Tensor:
    """Quality (n,) from 0 to 10 of images (n, 3, H, W) in [-1, 1]: the mean of three parts."""
    return 10 * parts(images).mean(1)


def parts(images: Tensor) -> Tensor:
    """Saturation, sharpness and cleanness (n, 3), each in [0, 1] and blind to the layout."""
    seen = read(images)
    return torch.stack([saturation(seen), sharpness(seen), cleanness(seen)], dim=1)


def saturation(seen: Reading) -> Tensor:
    """HSV saturation of figure and ground, however large each is: 0 at 0.35, 1 at 0.9."""
    colours = torch.stack([seen.figure, seen.ground])
    high, low = colours.amax(-1), colours.amin(-1)
    return _ramp(((high - low) / high.clamp(min=1e-3)).mean(0), 0.35, 0.9)


def sharpness(seen: Reading) -> Tensor:
    """How abrupt the outline is: the steepest change over two pixels, as a share of the contrast."""
    across = (seen.cover[:, :, 2:] - seen.cover[:, :, :-2]).abs()[:, 1:-1]
    down = (seen.cover[:, 2:] - seen.cover[:, :-2]).abs()[:, :, 1:-1]
    # Two dozen pixels: even the smallest outline has as many.
    steepest = torch.maximum(across, down).flatten(1).topk(24).values.mean(1)
    return torch.where(seen.contrast > 0.1, _ramp(steepest, 0.5, 1.0), 0.0)


def cleanness(seen: Reading) -> Tensor:
    """How little the flat areas vary: 1 for none, 0 at a standard deviation of 0.06."""
    squares = (seen.residual**2).mean(1)
    rms = ((squares * seen.flat).sum((1, 2)) / seen.flat.sum((1, 2)).clamp(min=1)).sqrt()
    return _ramp(rms, 0.06, 0.01)


def _ramp(values: Tensor, zero: float, one: float) -> Tensor:
    return ((values - zero) / (one - zero)).clamp(0, 1)
