"""CLIPs of transformers: preparation of images and prompts, loading, checks."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel
from transformers.tokenization_utils_base import LARGE_INTEGER

# PIL resizes, as in transformers 4 and so in what papers report; torchvision is a grey level off.
try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # the first versions of transformers 5
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil

from spo.command_line.values import require_choice
from spo.data.token_lengths import readable
from spo.errors import UserError, first_line
from spo.hub import PREFETCH, model_file
from spo.models.weights import load_network
from spo.scorers.state_dicts import check_packed


@dataclass(frozen=True)
class ImagePreparation:
    """From images in [-1, 1] to a CLIP's pixels, in differentiable fp32 operations."""

    size: int  # of the square that is cut out
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resized: int | tuple[int, int] | None = None  # shorter side before, or both sides; None: size

    def __call__(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 3, size, size): resize, centre crop, to [0, 1], clamp, normalise."""
        height, width = images.shape[-2:]
        shape = self.resized or self.size
        if isinstance(shape, int):
            ratio = shape / min(height, width)
            shape = (round(height * ratio), round(width * ratio))
        images = F.interpolate(images.float(), shape, mode="bicubic", align_corners=False)
        # Halves are rounded to even numbers, as by torchvision.
        top, left = round((shape[0] - self.size) / 2), round((shape[1] - self.size) / 2)
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
            self.tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
            self.image_processor = CLIPImageProcessorPil.from_pretrained(processor)
            self.prepare = _preparation(self.image_processor)
            if self.tokenizer.model_max_length >= LARGE_INTEGER:
                raise ValueError("its tokenizer_config.json has no model_max_length; 77 in CLIPs")
            self.tokenize([""])

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Returns token ids (B, L), padded and truncated to the tokenizer's own length L."""
        return self.tokenizer(
            readable(prompts), padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids


def _preparation(processor: CLIPImageProcessorPil) -> ImagePreparation:
    """Returns the same preparation for tensors; raises ValueError if it makes no squares."""
    found = processor(images=Image.new("RGB", (3, 2)), return_tensors="pt").pixel_values[0]
    square, size = found.shape[-1], dict(processor.size)
    if (
        size.keys() not in ({"shortest_edge"}, {"height", "width"})
        or found.shape != (3, square, square)
        or not found.isfinite().all()
        or square > min(size.values())
    ):
        raise ValueError(f"it cuts no square out of every image (size {size})")
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    resized = size.get("shortest_edge") or (size["height"], size["width"])
    return ImagePreparation(square, mean, std, resized)


@contextlib.contextmanager
def loading(model: str, key: str) -> Iterator[None]:
    """Raises UserError that names `model` and the config `key` if transformers cannot load it."""
    try:
        yield
    except Exception as error:  # which one depends on what is odd in the files
        reason = f"{model!r} cannot be loaded ({first_line(error)})"
        raise UserError(f"{key}: {reason}; to download it: {PREFETCH}") from error


def text_features(clip: CLIPModel, input_ids: Tensor) -> Tensor:
    """Returns unit-norm fp32 text features (n, D); the end-of-text token hides the padding after it."""
    features = clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output).float()
    return features / features.norm(dim=-1, keepdim=True)


def load_clip(backbone: str, section: str = "preference") -> CLIPModel:
    """Returns a CLIP with its weights, in fp32 on the CPU; raises UserError if it cannot be loaded."""
    return load_part_of_clip(CLIPModel, backbone, f"{section}.backbone")


def load_part_of_clip(kind: type, clip: str, key: str) -> nn.Module:
    """Returns what class `kind` reads of a CLIP, in fp32 on the CPU; UserError names `key`."""
    with loading(clip, key):
        for path in Path(clip).glob("*.bin"):
            check_packed(path)
        return load_network(kind, clip, "CLIP", dtype=torch.float32)


def clip_config(backbone: str, section: str = "preference") -> CLIPConfig:
    """Returns the architecture of a CLIP; raises UserError if it cannot be read."""
    with loading(backbone, f"{section}.backbone"):
        return CLIPConfig.from_pretrained(backbone)


def check_clip(backbone: str, processor: str, section: str = "preference") -> None:
    """Raises UserError for a bad CLIP or processor of config `section`, by their small files."""
    model_file(backbone, "config.json", f"{section}.backbone")
    model_file(processor, "preprocessor_config.json", f"{section}.processor")
    config, inputs = clip_config(backbone, section), CLIPInputs(processor, section)
    made = (inputs.prepare.size, inputs.tokenizer.model_max_length)
    taken = (config.vision_config.image_size, config.text_config.max_position_embeddings)
    if made[0] != taken[0] or made[1] > taken[1]:
        each = "{0} x {0} pixels and {1} tokens".format
        reason = f"{processor!r} makes {each(*made)}, but {backbone!r} takes {each(*taken)}"
        raise UserError(f"{section}.processor: {reason}.")


def weight_dtype(name: str, section: str = "preference") -> torch.dtype:
    """Returns the dtype that `dtype` in the config `section` names; UserError for an unknown name."""
    require_choice(f"{section}.dtype", name, ("float32", "float16", "bfloat16"))
    return getattr(torch, name)
