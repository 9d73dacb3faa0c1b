"""PIL images and tensors."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """Returns PIL images of a tensor (n, 3, H, W) in [-1, 1]; values outside are clamped."""
    pixels = (images.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(np.asarray(p)) for p in pixels.permute(0, 2, 3, 1).cpu()]


def unit_pixels(image: Image.Image) -> Tensor:
    """Returns the pixels (3, H, W) in [0, 1] of an image of any mode."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
