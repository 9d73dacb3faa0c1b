"""The LoRA file of a run, in diffusers' format: names and bytes."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from spo.atomic import write_file
from spo.models.lora import Lora

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = ".default."  # peft puts the adapter's name into the name of each parameter


def file_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `weights` under the names of a diffusers LoRA file."""
    return {
        "unet." + name.replace(_ADAPTER, "."): tensor.detach().cpu().contiguous()
        for name, tensor in weights.items()
    }


def parameter_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the inverse of `file_names`."""
    return {
        name.removeprefix("unet.").replace(".weight", _ADAPTER + "weight"): tensor
        for name, tensor in weights.items()
    }


def save_lora(
    path: Path, lora: Lora, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes `weights` as a file for diffusers' `load_lora_weights`.

    Equal weights and metadata give equal bytes: the header holds neither time nor place.
    """
    # diffusers reads alpha from this entry, and takes the rank for alpha without the entry.
    adapter = {
        "unet.r": lora.rank,
        "unet.lora_alpha": lora.alpha,
        "unet.target_modules": sorted(lora.target_modules),
    }
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        "rank": str(lora.rank),
        "alpha": str(lora.alpha),
        **metadata,
    }
    write_file(path, safetensors_bytes(file_names(weights), header))


def safetensors_bytes(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file; equal tensors and metadata give equal bytes.

    The library writes the metadata in a random order: here they are sorted.
    """
    file = save(tensors, metadata=dict(metadata))
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return len(text).to_bytes(8, "little") + text + file[8 + length :]
