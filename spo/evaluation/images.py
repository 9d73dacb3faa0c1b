"""From PIL images to tensors."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def unit_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1] of an image of any mode."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255
