"""Reads images of the tiny world from their pixels, without a model."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.tiny_world.scenes import COLOURS, HUES, SHAPES, SIDE, SIZES, Caption, coverage

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
    cover = along / contrast.square().clamp(min=1e-4)[:, None, None]
    kept = cover.clamp(0, 1)
    flat = (kept < 0.12) | (kept > 0.88)
    painted = ground[..., None, None] + kept.round()[:, None] * step[..., None, None]
    return Reading(ground, figure, kept, rgb - painted, flat.float(), contrast)


def read_captions(images: Tensor) -> list[Caption]:
    """Returns the captions that images (n, 3, SIDE, SIDE) show.

    Colours are told by hue, shape and size by the template that overlaps most.
    """
    seen = read_scenes(images)
    shapes, radii = _best_template(seen.cover)
    sizes = ["small" if radius < _SIZE_LIMIT else "large" for radius in radii]
    figures = map(_nearest_colour, seen.figure.tolist())
    grounds = map(_nearest_colour, seen.ground.tolist())
    return list(map(Caption, sizes, figures, shapes, grounds))


def _nearest_colour(rgb: Sequence[float]) -> str:
    """Returns the named colour whose hue is closest."""
    hue = 360 * colorsys.rgb_to_hsv(*rgb)[0]
    return min(COLOURS, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180))


def _best_template(cover: Tensor) -> tuple[list[str], list[float]]:
    """Returns the shape and radius that overlap most with each `cover` (n, H, W), near its middle."""
    sizes = torch.arange(SIZES["small"][0] - 1, SIZES["large"][1] + 1.01, 0.5)
    offsets = torch.tensor([-1.0, 0.0, 1.0])
    templates = torch.cartesian_prod(torch.arange(len(SHAPES)).float(), sizes, offsets, offsets)
    shapes = [SHAPES[int(i)] for i in templates[:, 0]]
    found: list[tuple[str, float]] = []
    for one in cover:
        mass = one.sum().clamp(min=1e-6)
        grid = torch.arange(SIDE) + 0.5
        middle = torch.stack([(one.sum(0) * grid).sum(), (one.sum(1) * grid).sum()]) / mass
        drawn = coverage(shapes, templates[:, 1], middle[:, None] + templates[:, 2:].T)
        overlap = torch.minimum(drawn, one).sum((1, 2)) / torch.maximum(drawn, one).sum((1, 2))
        best = int(overlap.argmax())
        found.append((shapes[best], float(templates[best, 1])))
    return [shape for shape, _ in found], [radius for _, radius in found]
