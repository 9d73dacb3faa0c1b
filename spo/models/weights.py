"""Loads one network of diffusers or transformers, every tensor of it from its file."""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors import safe_open
from torch import nn

from spo.errors import first_line
from spo.hub import list_files, model_file

# What stands in files of some versions of a library alone, or belongs to another tower of a CLIP.
_CONSTANT = "position_ids"
_OF_ANOTHER_TOWER = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
# What `load_network` tells in one line, and what is of no use.
_MUTED = ("Some weights of ", " LOAD REPORT", "should be kept in float32")
for _name in ("diffusers.models.modeling_utils", "transformers.modeling_utils"):
    logging.getLogger(_name).addFilter(lambda r: not any(t in r.getMessage() for t in _MUTED))
# The bars of models that load, seconds each; those of downloads stay, which transformers hides, too.
_DOWNLOADS = not are_progress_bars_disabled()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()
if _DOWNLOADS:
    enable_progress_bars()


def load_network(kind: type, name: str, part: str, **options: Any) -> nn.Module:
    """Returns the network of class `kind` of a folder or Hub id, by its `from_pretrained(**options)`.

    Raises ValueError that names `part` and what is wrong with its files, above all a tensor that is
    missing, unknown or of another shape.
    """
    if issubclass(kind, transformers.PreTrainedModel):
        options |= {"ignore_mismatched_sizes": True, "trust_remote_code": False}
    try:
        network, info = kind.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # transformers has errors of its own for values of a config
        raise ValueError(f"{part}: {reason(error)}") from error
    extra = {key for key in info["unexpected_keys"] if not key.startswith(_OF_ANOTHER_TOWER)}
    if any(".base_layer." in key for key in extra):
        raise ValueError(
            f"{part}: saved with a LoRA of peft beside its weights; merge it (pipe.fuse_lora(), then "
            "pipe.unload_lora_weights()) and save it again"
        )
    misshaped = (key for key, *_ in info["mismatched_keys"])
    check_names(part, info["missing_keys"], misshaped, extra)
    return network


def check_names(
    part: str, missing: Iterable[str], misshaped: Iterable[str], unknown: Iterable[str]
) -> None:
    """Raises ValueError that names `part` and the first tensor that is wrong in its files."""
    faults = {
        "lack": missing,
        "have another shape of": misshaped,
        "do not belong to its config: they have": unknown,
    }
    for fault, keys in faults.items():
        if keys := sorted(key for key in keys if not key.endswith(_CONSTANT)):
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            raise ValueError(f"{part}: its weights {fault} {keys[0]}{more}")


def reason(error: Exception) -> str:
    """Returns the first line of diffusers' or transformers' message, without advice on their API."""
    return first_line(error).partition(". If you want")[0]


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
    is_safe: bool  # .safetensors, and not .bin


def choose_weights(names: Iterable[str], variant: str | None, part: str) -> WeightFile:
    """Returns the weights among the files of a folder: those of `variant`, else plain ones.

    Where there is but one variant, or one called fp16, it needs no name. Raises ValueError that names
    `part` if there are none, or the choice is open.
    """
    found: dict[str | None, WeightFile] = {}
    for name in sorted(names, key=lambda name: ".safetensors" in name):  # which take precedence
        if match := _FILE.fullmatch(name):
            own = match[1] or match[4]
            found[own] = WeightFile(name, own, match[2] == "safetensors")
    others = ", ".join(sorted(found.keys() - {None}))
    if variant and part == "unet" and variant not in found:
        raise ValueError(
            f"pretrained.variant: its UNet has {others or 'no variant'}, not {variant}"
        )
    for choice in (variant, None, "fp16", *(found if len(found) == 1 else ())):
        if choice in found:
            return found[choice]
    wanted = f"name one of {others} by pretrained.variant" if found else "no weights"
    raise ValueError(f"{part}: {wanted} (diffusion_pytorch_model or model)")


def fetch(
    model: str,
    folders: Iterable[str],
    key: str,
    variant: str | None = None,
    revision: str | None = None,
) -> Path:
    """Returns a folder as it is, or that of a Hub repo with the files of these subfolders.

    Downloads of the weights only those that `load_part` takes. Raises ValueError as `choose_weights`,
    and UserError that names the config `key`.
    """
    if Path(model).is_dir():
        return Path(model)
    files, root = list_files(model, key, revision), Path()
    for folder in folders:
        names = [PurePosixPath(f).name for f in files if f.rpartition("/")[0] == folder]
        wanted = [name for name in names if name.endswith((".json", ".txt"))]
        if PurePosixPath(folder).name in ("", *PARTS):
            wanted.append(choose_weights(names, variant, folder or model).name)
        for name in wanted:  # which grows by the files that an index names
            path = model_file(model, f"{folder}/{name}".lstrip("/"), key, revision)
            root = path.parents[1] if folder else path.parent
            if name == wanted[-1] and name.endswith(".json") and ".index." in name:
                wanted += sorted(set(json.loads(path.read_text())["weight_map"].values()))
    return root


def load_part(
    kind: type, root: Path, folder: str, dtype: torch.dtype, variant: str | None = None
) -> nn.Module:
    """Returns the network in a subfolder; raises ValueError as `load_network`."""
    part = PARTS.get(folder, kind.__name__)
    names = [path.name for path in (root / folder).glob("*")]
    file = choose_weights(names, variant, folder or part)
    options = {"variant": file.variant, "use_safetensors": file.is_safe, "dtype": dtype}
    return load_network(kind, str(root), part, subfolder=folder, **options)


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype of the weights in a folder."""
    file = choose_weights((path.name for path in folder.glob("*")), None, folder.name)
    path = folder / file.name
    if path.suffix == ".json":
        path = folder / min(json.loads(path.read_text())["weight_map"].values())
    if file.is_safe:
        with safe_open(path, framework="pt") as tensors:
            return tensors.get_tensor(next(iter(tensors.keys()))).dtype
    weights = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return next(iter(weights.values())).dtype
