"""CLIPs of transformers: preparation of images and prompts, loading, checks."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from spo.command_line.values import require_choice
from spo.data.token_lengths import readable
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import PREFETCH, model_file


@dataclass(frozen=True)
class ImagePreparation:
    """From images in [-1, 1] to a CLIP's pixels, in differentiable fp32 operations."""

    size: int  # of the shorter side, and of the square that is cut out
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 3, size, size): resize, centre crop, to [0, 1], clamp, normalise."""
        height, width = images.shape[-2:]
        ratio = self.size / min(height, width)
        shape = (round(height * ratio), round(width * ratio))
        images = F.interpolate(images.float(), shape, mode="bicubic", align_corners=False)
        top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        return self.normalise((images / 2 + 0.5).clamp(0, 1))

    def stretched(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 3, size, size): in [0, 1], resized to a square (SPO, arXiv 2406.04314)"""
        images = (images.float() / 2 + 0.5).clamp(0, 1)
        shape = (self.size, self.size)
        images = F.interpolate(images, shape, mode="bicubic", align_corners=False)
        return self.normalise(images.clamp(0, 1))

    def normalise(self, images: Tensor) -> Tensor:
        """Returns images in [0, 1] with zero mean and unit variance over CLIP's training data."""
        mean, std = (_per_channel(v, images.device, images.dtype) for v in (self.mean, self.std))
        return (images - mean) / std


# Cached: building a tensor from numbers on a GPU waits for the GPU.
@cache
def _per_channel(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1)


class CLIPInputs:
    """Tokenizer and image preparation of a Hub id or folder; UserError that names `processor`."""

    def __init__(self, processor: str, section: str = "preference") -> None:
        with loading(processor, f"{section}.processor"):
            self.tokenizer = AutoTokenizer.from_pretrained(processor)
            self.image_processor = CLIPImageProcessor.from_pretrained(processor)
        self.prepare = ImagePreparation(
            self.image_processor.size["shortest_edge"],
            tuple(self.image_processor.image_mean),
            tuple(self.image_processor.image_std),
        )

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Returns token ids (B, L), padded and truncated to the tokenizer's own length L."""
        return self.tokenizer(
            readable(prompts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids


@contextlib.contextmanager
def loading(model: str, key: str) -> Iterator[None]:
    """Raises UserError that names `model` and the config `key` if transformers cannot load it."""
    try:
        yield
    except LOAD_ERRORS as error:
        reason = f"{model!r} cannot be loaded ({first_line(error)})"
        raise UserError(f"{key}: {reason}; to download it: {PREFETCH}") from error


def text_features(clip: CLIPModel, input_ids: Tensor) -> Tensor:
    """Returns unit-norm text features (n, D); the end-of-text token hides the padding behind it."""
    features = clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output)
    return features / features.norm(dim=-1, keepdim=True)


def load_clip(backbone: str, section: str = "preference") -> CLIPModel:
    """Returns a CLIP with its weights, in fp32 on the CPU; raises UserError if it cannot be loaded."""
    with loading(backbone, f"{section}.backbone"):
        return CLIPModel.from_pretrained(backbone, dtype=torch.float32)


def clip_config(backbone: str, section: str = "preference") -> CLIPConfig:
    """Returns the architecture of a CLIP; raises UserError if it cannot be read."""
    with loading(backbone, f"{section}.backbone"):
        return CLIPConfig.from_pretrained(backbone)


def check_clip(backbone: str, processor: str, section: str = "preference") -> None:
    """Raises UserError for a bad CLIP or processor of config `section`, by their small files."""
    model_file(backbone, "config.json", f"{section}.backbone")
    model_file(processor, "preprocessor_config.json", f"{section}.processor")
    clip_config(backbone, section)
    CLIPInputs(processor, section)


def weight_dtype(name: str, section: str = "preference") -> torch.dtype:
    """Returns the dtype that `dtype` in the config `section` names; UserError for an unknown name."""
    require_choice(f"{section}.dtype", name, ("float32", "float16", "bfloat16"))
    return getattr(torch, name)
