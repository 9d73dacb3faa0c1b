"""Loads one network of diffusers or transformers, every tensor of it from its file."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import safe_open
from torch import nn

from spo.errors import LOAD_ERRORS, first_line
from spo.hub import list_files, model_file

# What stands in files of some versions of a library alone, or belongs to another tower of a CLIP.
_CONSTANT = "position_ids"
_OF_ANOTHER_TOWER = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
# `load_network` tells in one line what the libraries tell in tables.
for _name, _text in {
    "diffusers.models.modeling_utils": "Some weights of ",
    "transformers.modeling_utils": " LOAD REPORT",
}.items():
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())


def hide_loading_bars() -> None:
    """Turns off the bars of models that load, seconds each, and leaves those of downloads."""
    diffusers.utils.logging.disable_progress_bar()
    downloads = not are_progress_bars_disabled()
    transformers.utils.logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()  # which transformers has turned off, too


hide_loading_bars()


def load_network(kind: type, name: str, part: str, **options: Any) -> nn.Module:
    """Returns the network of class `kind` of a folder or Hub id, by its `from_pretrained(**options)`.

    Raises ValueError that names `part` and what is wrong with its files, above all a tensor that is
    missing, unknown or of another shape.
    """
    if issubclass(kind, transformers.PreTrainedModel):
        options |= {"ignore_mismatched_sizes": True, "trust_remote_code": False}
    try:
        network, info = kind.from_pretrained(name, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise ValueError(f"{part}: {first_line(error).partition('. If you want')[0]}") from error
    extra = {key for key in info["unexpected_keys"] if not key.startswith(_OF_ANOTHER_TOWER)}
    if any(".base_layer." in key for key in extra):
        raise ValueError(
            f"{part}: saved with a LoRA of peft beside its weights; merge it (pipe.fuse_lora(), then "
            "pipe.unload_lora_weights()) and save it again"
        )
    faults = {
        "lack": set(info["missing_keys"]),
        "have another shape of": {key for key, *_ in info["mismatched_keys"]},
        "do not belong to its config: they have": extra,
    }
    for fault, keys in faults.items():
        if keys := sorted(key for key in keys if not key.endswith(_CONSTANT)):
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise ValueError(f"{part}: its weights {fault} {keys[0]}{more}")
    return network


# model.safetensors, model.fp16.safetensors, model.safetensors.index.fp16.json, ...
_FILE = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?"
)
PARTS = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}


@dataclass(frozen=True)
class WeightFile:
    """The file of a network's weights, or the index of several."""

    name: str
    variant: str | None
    kind: str  # "safetensors" or "bin"


def find_weights(
    model: str, folder: str, key: str, variant: str | None = None, revision: str | None = None
) -> WeightFile:
    """Returns the weights in a subfolder of a folder or Hub repo: those of `variant`, else plain ones.

    Where there is but one variant, or one called fp16, it needs no name. Raises ValueError if the
    choice is open.
    """
    if Path(model).is_dir():
        names = [path.name for path in (Path(model) / folder).glob("*")]
    else:
        start = f"{folder}/" if folder else ""
        files = (name for name in list_files(model, key, revision) if name.startswith(start))
        names = [name.removeprefix(start) for name in files]
    found: dict[str | None, WeightFile] = {}
    for name in sorted(names, key=lambda name: ".safetensors" in name):  # which take precedence
        if match := _FILE.fullmatch(name):
            own = match[1] or match[4]
            found[own] = WeightFile(name, own, match[2])
    others = ", ".join(sorted(found.keys() - {None}))
    if variant and folder == "unet" and variant not in found:
        raise ValueError(
            f"pretrained.variant: its UNet has {others or 'no variant'}, not {variant}"
        )
    for choice in (variant, None, "fp16", *(found if len(found) == 1 else ())):
        if choice in found:
            return found[choice]
    wanted = (
        f"name one of {others} by pretrained.variant"
        if found
        else "no diffusion_pytorch_model or model"
    )
    raise ValueError(f"{folder or model}: {wanted}")


def load_part(
    kind: type,
    model: str,
    folder: str,
    dtype: torch.dtype,
    key: str,
    variant: str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Returns the network in a subfolder of a folder or Hub repo; raises ValueError as above."""
    file = find_weights(model, folder, key, variant, revision)
    return load_network(
        kind,
        model,
        PARTS.get(folder, kind.__name__),
        subfolder=folder,
        dtype=dtype,
        variant=file.variant,
        revision=revision,
        use_safetensors=file.kind == "safetensors",
    )


def stored_dtype(model: str, folder: str, key: str) -> torch.dtype:
    """Returns the dtype that the weights in a subfolder are stored in."""
    file = find_weights(model, folder, key)
    path = model_file(model, f"{folder}/{file.name}", key)
    if path.suffix == ".json":
        shard = min(json.loads(path.read_text())["weight_map"].values())
        path = model_file(model, f"{folder}/{shard}", key)
    if file.kind == "safetensors":
        with safe_open(path, framework="pt") as tensors:
            return tensors.get_tensor(next(iter(tensors.keys()))).dtype
    weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return next(iter(weights.values())).dtype
