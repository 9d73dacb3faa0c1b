"""Reads images of the tiny world from their pixels, without a model: captions and hidden quality.

GradSPO never sees the quality: it labels the pairs that the preference model learns from, and it
measures at the end whether the images have become better.
"""

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from spo.scorers import ImageScorer
from spo.scorers.pixels import unit_pixels
from spo.tiny_world.scenes import HUES, SHAPES, SIDE, SIZES, Caption, coverage

_SIZE_LIMIT = 8.6  # pixels of radius: midway between the sizes
_FIGURE_PIXELS = 40  # fewer than the smallest figure covers


@dataclass(frozen=True)
class Reading:
    """n images as a flat ground and a flat figure on it."""

    ground: Tensor  # (n, 3) RGB in [0, 1]: the median along the border
    figure: Tensor  # (n, 3) the median of the pixels that differ most from the ground
    cover: Tensor  # (n, H, W) from 0 on the ground to 1 on the figure
    residual: Tensor  # (n, 3, H, W) the image minus the two flat colours
    flat: Tensor  # (n, H, W) 1 where a pixel is all ground or all figure, else 0
    contrast: Tensor  # (n,) distance of the two colours


def read_scenes(images: Tensor) -> Reading:
    """Returns ground, figure and cover of images (n, 3, H, W) in [-1, 1]."""
    rgb = (images.float() / 2 + 0.5).clamp(0, 1)
    border = torch.cat([rgb[..., 0, :], rgb[..., -1, :], rgb[..., 0], rgb[..., -1]], dim=-1)
    ground = border.median(dim=-1).values
    away = (rgb - ground[..., None, None]).norm(dim=1).flatten(1)
    farthest = away.topk(_FIGURE_PIXELS).indices[:, None].expand(-1, 3, -1)
    figure = rgb.flatten(2).gather(2, farthest).median(dim=-1).values
    step = figure - ground
    contrast = step.norm(dim=1)
    along = torch.einsum("nchw,nc->nhw", rgb - ground[..., None, None], step)
    cover = (along / contrast.square().clamp(min=1e-4)[:, None, None]).clamp(0, 1)
    flat = (cover < 0.12) | (cover > 0.88)
    painted = ground[..., None, None] + cover.round()[:, None] * step[..., None, None]
    return Reading(ground, figure, cover, rgb - painted, flat.float(), contrast)


def read_captions(images: Tensor) -> list[Caption]:
    """Returns the captions that images (n, 3, SIDE, SIDE) show.

    Colours are told by hue, shape and size by the template that overlaps most.
    """
    seen, captions = read_scenes(images), []
    for figure, ground, cover in zip(seen.figure, seen.ground, seen.cover, strict=True):
        shape, radius = _best_template(cover)
        size = "small" if radius < _SIZE_LIMIT else "large"
        captions.append(Caption(size, _nearest_colour(figure), shape, _nearest_colour(ground)))
    return captions


def _nearest_colour(rgb: Tensor) -> str:
    """Returns the named colour whose hue is closest."""
    hue = 360 * colorsys.rgb_to_hsv(*rgb.tolist())[0]
    return min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180))


def _best_template(cover: Tensor) -> tuple[str, float]:
    """Returns the shape and radius that overlap most with `cover` (H, W), near its middle."""
    sizes = torch.arange(SIZES["small"][0] - 1, SIZES["large"][1] + 1.01, 0.5)
    offsets = torch.tensor([-1.0, 0.0, 1.0])
    templates = torch.cartesian_prod(torch.arange(len(SHAPES)).float(), sizes, offsets, offsets)
    shapes = [SHAPES[int(i)] for i in templates[:, 0]]
    grid = torch.arange(SIDE) + 0.5
    middle = torch.stack([(cover.sum(0) * grid).sum(), (cover.sum(1) * grid).sum()])
    middle /= cover.sum().clamp(min=1e-6)
    drawn = coverage(shapes, templates[:, 1], middle[:, None] + templates[:, 2:].T)
    overlap = torch.minimum(drawn, cover).sum((1, 2)) / torch.maximum(drawn, cover).sum((1, 2))
    best = int(overlap.argmax())
    return shapes[best], float(templates[best, 1])


def hidden_quality(images: Tensor) -> Tensor:
    """Returns the quality (n,), 0 to 10, of images (n, 3, H, W) in [-1, 1]: 10 x mean of parts."""
    return 10 * quality_parts(images).mean(1)


def quality_parts(images: Tensor) -> Tensor:
    """Returns saturation, sharpness and cleanness (n, 3), each in [0, 1] and blind to the layout."""
    seen = read_scenes(images)
    # Mean HSV saturation of figure and ground: 0 at 0.35, 1 at 0.9.
    colours = torch.stack([seen.figure, seen.ground])
    high, low = colours.amax(-1), colours.amin(-1)
    saturation = _ramp(((high - low) / high.clamp(min=1e-3)).mean(0), 0.35, 0.9)
    # The steepest change over two pixels, as a share of the contrast, of the two dozen pixels that the
    # smallest outline has at least.
    across = (seen.cover[:, :, 2:] - seen.cover[:, :, :-2]).abs()[:, 1:-1]
    down = (seen.cover[:, 2:] - seen.cover[:, :-2]).abs()[:, :, 1:-1]
    steepest = torch.maximum(across, down).flatten(1).topk(24).values.mean(1)
    sharpness = torch.where(seen.contrast > 0.1, _ramp(steepest, 0.5, 1.0), 0.0)
    # The standard deviation of flat areas: 1 at 0.01, 0 at 0.06.
    squares = (seen.residual**2).mean(1)
    rms = ((squares * seen.flat).sum((1, 2)) / seen.flat.sum((1, 2)).clamp(min=1)).sqrt()
    return torch.stack([saturation, sharpness, _ramp(rms, 0.06, 0.01)], dim=1)


def _ramp(values: Tensor, zero: float, one: float) -> Tensor:
    return ((values - zero) / (one - zero)).clamp(0, 1)


def shows_caption(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns 1 or 0 (n,) for images (n, 3, SIDE, SIDE) that show all or not all of their prompts."""
    shown = [str(caption) for caption in read_captions(images)]
    return torch.tensor([float(a == b) for a, b in zip(shown, prompts, strict=True)])


class PixelScorer(ImageScorer):
    """A scorer for `scripts/evaluate.py` that reads images (n, 3, H, W) in [-1, 1] and prompts."""

    def __init__(
        self, title: str, scale: float, of_pixels: Callable[..., Tensor], device: torch.device
    ) -> None:
        self.title, self.scale, self.of_pixels = title, scale, of_pixels

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([unit_pixels(image) for image in images])
        return self.of_pixels(pixels * 2 - 1, prompts)


quality = partial(PixelScorer, "Hidden quality", 1.0, lambda pixels, _: hidden_quality(pixels))
faithfulness = partial(PixelScorer, "Faithful", 100.0, shows_caption)  # in percent
