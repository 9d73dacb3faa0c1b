"""What the pixels of images say without a model, and how much images of one prompt differ."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_LUMINANCE = (0.2126, 0.7152, 0.0722)  # of R, G and B: ITU-R BT.709
_HIGH = 0.25  # cycles per pixel: half of the highest frequency along a row


def saturation(images: Tensor) -> Tensor:
    """Returns the mean HSV saturation (n,) of images (n, 3, H, W) in [0, 1]."""
    high, low = images.amax(dim=1), images.amin(dim=1)
    return ((high - low) / high.clamp(min=1 / 255)).mean(dim=(1, 2))


def contrast(images: Tensor) -> Tensor:
    """Returns the standard deviation (n,) of the luminance of images (n, 3, H, W) in [0, 1]."""
    return luminance(images).flatten(1).std(dim=1, correction=0)


def clipped(images: Tensor) -> Tensor:
    """Returns the share (n,) of values that 8 bits hold as 0 or 255, of images (n, 3, H, W)."""
    levels = (images * 255).round()
    return ((levels <= 0) | (levels >= 255)).float().mean(dim=(1, 2, 3))


def high_frequencies(images: Tensor) -> Tensor:
    """Returns the standard deviation (n,) of the luminance that fine detail alone has.

    Fine are spatial frequencies of a quarter cycle per pixel or more; images (n, 3, H, W) in [0, 1].
    """
    grey = luminance(images)
    height, width = grey.shape[1:]
    rows = torch.fft.fftfreq(height, device=grey.device)[:, None]
    columns = torch.fft.fftfreq(width, device=grey.device)
    is_high = torch.hypot(rows, columns) >= _HIGH
    power = torch.fft.fft2(grey, norm="forward").abs().square()  # sums up to the mean square
    return (power * is_high).sum(dim=(1, 2)).sqrt()


def luminance(images: Tensor) -> Tensor:
    """Returns the luminance (n, H, W) of images (n, 3, H, W)."""
    return torch.einsum("nchw,c->nhw", images, images.new_tensor(_LUMINANCE))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (saturation, contrast, clipped, high_frequencies)
}
DIVERSITY = "diversity"


def diversity(features: Tensor) -> Tensor:
    """Returns the mean cosine distance (n,) between the images of each of n prompts.

    `features` (s, n, D) are of unit norm: of s images of each prompt, from different seeds.
    """
    seeds = len(features)
    cosines = torch.einsum("snd,tnd->stn", features, features)
    others = cosines.sum(dim=(0, 1)) - cosines.diagonal(dim1=0, dim2=1).sum(dim=-1)
    return 1 - others / (seeds * (seeds - 1))
