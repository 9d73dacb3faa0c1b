"""The world: its captions, and images that show them.

A caption such as "a small red circle on a blue background" names size, colour, shape and
background. An image adds a position, and flaws in brightness, saturation, contrast, blur and blotches.
"""

import colorsys
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels
# Hues at least 40 degrees apart, so that a pale colour can still be told from its neighbours.
HUES = {"red": 0, "yellow": 55, "green": 120, "cyan": 180, "blue": 230, "purple": 275, "pink": 320}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (6.5, 7.2), "large": (10.0, 10.6)}  # radius of a circle of that size, pixels


@dataclass(frozen=True)
class Caption:
    """A caption, word by word."""

    size: str
    colour: str
    shape: str
    background: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"


def all_captions() -> list[Caption]:
    """Returns every caption of the world; shape and background differ in colour."""
    captions = itertools.starmap(Caption, itertools.product(SIZES, HUES, SHAPES, HUES))
    return [caption for caption in captions if caption.colour != caption.background]


# The flaws of an image are drawn independently and uniformly from these ranges.
FLAWS = {
    "saturation": (0.4, 1.0),
    "brightness": (0.6, 1.0),
    "contrast": (0.75, 1.0),  # the rest is mid-grey
    "blur": (0.0, 1.3),  # standard deviation, pixels
    "blotches": (0.0, 0.06),  # standard deviation, of the pixel range
}


def draw_flaws(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns the flaws of n images, (n,) each."""
    drawn = zip(FLAWS.items(), torch.rand(len(FLAWS), n, generator=generator), strict=True)
    return {name: low + (high - low) * uniform for (name, (low, high)), uniform in drawn}


def draw_scenes(n: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Returns n captions drawn uniformly, and an image (n, 3, SIDE, SIDE) of each."""
    captions = all_captions()
    drawn = [captions[i] for i in torch.randint(len(captions), (n,), generator=generator)]
    images = render(drawn, draw_flaws(n, generator), generator)
    return [str(caption) for caption in drawn], images


def render(
    captions: Sequence[Caption], flaws: Mapping[str, Tensor], generator: torch.Generator
) -> Tensor:
    """Returns images (n, 3, SIDE, SIDE) in [-1, 1] of n captions, at random positions and sizes."""
    n = len(captions)
    low, high = torch.tensor([SIZES[c.size] for c in captions]).unbind(1)
    radius = low + (high - low) * torch.rand(n, generator=generator)
    room = (SIDE / 2 - 1.3 * radius - 1).clamp(min=0)
    centre = SIDE / 2 + room * (2 * torch.rand(2, n, generator=generator) - 1)
    inside = coverage([c.shape for c in captions], radius, centre)
    figure = _colours([c.colour for c in captions], flaws)
    ground = _colours([c.background for c in captions], flaws)
    images = torch.lerp(ground[..., None, None], figure[..., None, None], inside[:, None])
    images = _blur(images, flaws["blur"])
    images = 0.5 + flaws["contrast"].view(n, 1, 1, 1) * (images - 0.5)
    # Smooth noise of unit variance, blotches about eight pixels wide.
    coarse = torch.randn(n, 1, SIDE // 8 + 1, SIDE // 8 + 1, generator=generator)
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True)
    blotches = smooth / smooth.std(dim=(1, 2, 3), keepdim=True)
    images = images + flaws["blotches"].view(n, 1, 1, 1) * blotches
    return images.clamp(0, 1) * 2 - 1


def coverage(shapes: Sequence[str], radius: Tensor, centre: Tensor) -> Tensor:
    """Returns the share of each pixel that n shapes cover, (n, SIDE, SIDE) in [0, 1].

    `radius` (n,) is the radius of a circle of the same size, `centre` (2, n) is (x, y), in pixels.
    """
    grid = torch.arange(SIDE) + 0.5
    x = grid[None, None, :] - centre[0, :, None, None]
    y = grid[None, :, None] - centre[1, :, None, None]
    r = radius[:, None, None]
    distances = {
        "circle": torch.hypot(x, y) - r,
        "square": torch.maximum(x.abs(), y.abs()) - 0.89 * r,
        # An equilateral triangle, point up: three edges at 0.62 r from a centre 0.2 r lower.
        "triangle": torch.maximum(0.866 * x.abs() - 0.5 * (y - 0.2 * r), y - 0.2 * r) - 0.68 * r,
        "cross": torch.minimum(
            torch.maximum(x.abs() - 1.12 * r, y.abs() - 0.4 * r),
            torch.maximum(y.abs() - 1.12 * r, x.abs() - 0.4 * r),
        ),
    }
    which = torch.tensor([SHAPES.index(shape) for shape in shapes])
    distance = torch.stack([distances[shape].expand(len(which), SIDE, SIDE) for shape in SHAPES])
    return (0.5 - distance[which, torch.arange(len(which))]).clamp(0, 1)


def _colours(names: Sequence[str], flaws: Mapping[str, Tensor]) -> Tensor:
    """Returns RGB (n, 3) in [0, 1] of named colours, with the saturation and brightness of `flaws`."""
    pure = torch.tensor([colorsys.hsv_to_rgb(HUES[name] / 360, 1, 1) for name in names])
    pale = 1 - flaws["saturation"][:, None] * (1 - pure)
    return flaws["brightness"][:, None] * pale


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Returns each image blurred by a Gaussian of its own width, sigma (n,) in pixels."""
    n = len(images)
    offsets = torch.arange(-4, 5)
    kernel = torch.exp(-0.5 * (offsets / sigma.clamp(min=0.05)[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, dim=0)
    rows = F.pad(images, (4, 4, 4, 4), mode="replicate").reshape(1, 3 * n, SIDE + 8, SIDE + 8)
    rows = F.conv2d(rows, kernel[:, None, :, None], groups=3 * n)
    return F.conv2d(rows, kernel[:, None, None, :], groups=3 * n).view_as(images)
