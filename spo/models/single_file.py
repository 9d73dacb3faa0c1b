"""Checkpoints of all weights in one .safetensors file, as ComfyUI and A1111 read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTokenizer

from spo.command_line.config_files import REPO_ROOT
from spo.errors import UserError, first_line
from spo.hub import resolve_file
from spo.models.families import FAMILIES

_ARCHITECTURES = REPO_ROOT / "assets" / "architectures"
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_FIRST_LAYER = f"{_UNET}input_blocks.0.0.weight"
_OTHERS = {  # by the names of their text encoders
    "cond_stage_model.model.": "a Stable Diffusion 2 checkpoint",
    "conditioner.embedders.0.model.": "SDXL's refiner, which goes on from another model's latents",
    "": "no checkpoint of Stable Diffusion with UNet and text encoders",
}


@dataclass(frozen=True)
class SingleFile:
    """Facts about a checkpoint that its header tells."""

    path: Path
    family: str
    configs: Path  # a diffusers folder without weights: beside the file, or the published one
    channels: int  # that the UNet reads
    dtype: torch.dtype  # of the UNet
    has_vae: bool
    schedule: Mapping[str, Any]  # what it says of its scheduler config

    def load(self, dtype: torch.dtype, **parts: Any) -> DiffusionPipeline:
        """Returns the pipeline with `parts` in place of the file's; raises one of LOAD_ERRORS."""
        kind = getattr(diffusers, FAMILIES[self.family].pipeline)
        if not (self.configs / "tokenizer").is_dir():
            parts["tokenizer"] = clip_tokenizer(pad="<|endoftext|>")
            if self.family == "sdxl":
                parts["tokenizer_2"] = clip_tokenizer(pad="!")
        if not (self.has_vae or "vae" in parts):
            raise ValueError("it has no VAE; name one with pretrained.vae")
        options = {"config": str(self.configs), "dtype": dtype, "local_files_only": True}
        try:
            # Which would move tensors that are missing, and not name them.
            with mock.patch("diffusers.loaders.single_file_model.dispatch_model"):
                pipe = kind.from_single_file(str(self.path), **options, **parts)
        except (KeyError, SingleFileComponentError) as error:
            raise ValueError(f"it lacks {first_line(error)}") from error
        networks = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module)}
        for name, part in networks.items():
            if lacking := [key for key, value in part.state_dict().items() if value.is_meta]:
                raise ValueError(f"{name}: its weights lack {lacking[0]}")
        config = dict(pipe.scheduler.config) | self.schedule
        pipe.scheduler = type(pipe.scheduler).from_config(config)
        return pipe


def is_single_file(model: str) -> bool:
    """Tells if a name is that of a file and not of a folder or Hub repo."""
    return str(model).endswith((".safetensors", ".ckpt", ".pt", ".pth"))


def is_checkpoint(path: Path) -> bool:
    """Tells if a .safetensors file is a whole model and not a LoRA."""
    try:
        with safe_open(path, framework="pt") as file:
            return _FIRST_LAYER in file.keys()  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError):
        return False


def read_single_file(model: str, key: str, revision: str | None = None) -> SingleFile:
    """Reads the header of a file, a path or hf://user/repo/file; UserError if it is no checkpoint."""
    if not model.endswith(".safetensors"):
        raise UserError(
            f"{key}: {model!r} is a pickle, which may run code; save it as .safetensors first."
        )
    path = resolve_file(model, key, revision)
    try:
        with safe_open(path, framework="pt") as file:
            names, header = list(file.keys()), file.metadata() or {}
            first = file.get_tensor(_FIRST_LAYER) if _FIRST_LAYER in names else torch.empty(0, 0)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {path} cannot be read ({first_line(error)}).") from error

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    family = next((n for n, f in FAMILIES.items() if has(f.text_encoder_in_file)), None)
    if family is None or not first.numel():
        found = next(what for prefix, what in _OTHERS.items() if has(prefix) or not prefix)
        raise UserError(f"{key}: {model!r} is {found}.")
    if any(name.endswith(("scale_weight", "weight_scale", "scaled_fp8")) for name in names):
        raise UserError(f"{key}: {model!r} is quantized; name the model in fp16 or fp32.")
    configs, beside = _ARCHITECTURES / family, path.parent
    if all((beside / name).is_file() for name in ("model_index.json", "unet/config.json")):
        configs = beside
    schedule: dict[str, Any] = {}
    if "v_pred" in names or header.get("modelspec.prediction_type") in ("v", "v_prediction"):
        schedule = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in names}
    return SingleFile(path, family, configs, first.shape[1], first.dtype, has(_VAE), schedule)


def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """Returns the tokenizer of SD1.5 and SDXL, from the vocabulary that open_clip ships."""
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds to import

    clip = SimpleTokenizer()
    vocab = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(k, k): v
        for k, v in clip.encoder.items()
    }
    return CLIPTokenizer(vocab, list(clip.bpe_ranks), pad_token=pad, model_max_length=77)
