"""Reading LoRA files: our own, diffusers' old and new, and kohya's, from a path or the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spo.backbone import Backbone
from spo.errors import UserError
from spo.hub import resolve_file
from spo.lora import FILE_NAME, Lora, parameter_names

_KEY = "lora.init_from"


def find_lora(spec: str) -> Path:
    """The LoRA file that `spec` names: a file, a run or checkpoint folder, or user/name[/file].

    Raises UserError that names `spec`.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return resolve_file(str(path / FILE_NAME), _KEY)
    name = spec.removeprefix("hf://").rstrip("/")
    if path.is_file() or spec.startswith((".", "/", "~")) or "/" not in name:
        return resolve_file(spec, _KEY)
    file = name if name.endswith(".safetensors") else f"{name}/{FILE_NAME}"
    return resolve_file(f"hf://{file}", _KEY)


def read_lora(path: Path, backbone: Backbone, lora: Lora) -> dict[str, Tensor]:
    """The weights in `path` under the names of `lora`'s parameters, fp32, scaled to its alpha.

    Raises UserError where the file is damaged, or of another base model, rank or set of modules.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        state, alphas = backbone.lora_state_dict(weights)
        unet = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
        found = parameter_names(convert_unet_state_dict_to_peft(unet))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{_KEY}: {path} cannot be read as a LoRA: {error}") from error
    _check_fit(path, found, lora)
    adapter = json.loads(header.get("lora_adapter_metadata", "{}"))
    default = adapter.get("unet.lora_alpha", lora.rank)
    result = {}
    for name, parameter in lora.parameters.items():
        tensor = found[name].to(parameter.device, torch.float32)
        if "lora_B" in name:
            module = name.split(".lora_B")[0]
            tensor = tensor * (float(alphas.get(f"unet.{module}.alpha", default)) / lora.alpha)
        result[name] = tensor
    return result


def _check_fit(path: Path, found: Mapping[str, Tensor], lora: Lora) -> None:
    wanted = lora.parameters
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        example = min(missing or unknown)
        raise UserError(
            f"{_KEY}: {path} has {len(unknown)} tensors that this base model and "
            f"lora.target_modules do not have, and lacks {len(missing)} (e.g. {example})."
        )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{_KEY}: {path} has {tuple(found[name].shape)} for {name}, but lora.rank="
                f"{lora.rank} on this base model needs {tuple(parameter.shape)}."
            )
