"""Reading LoRA files: our own, diffusers' old and new, and kohya's, from a path or the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spo.backbone import Backbone
from spo.errors import UserError
from spo.hub import list_files, resolve_file
from spo.lora import FILE_NAME, Lora, parameter_names
from spo.lora_formats import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def find_lora(spec: str, key: str) -> Path:
    """The LoRA file that `spec` names: a file, a folder, or on the Hub user/repo[/folder][/file].

    In a folder, of a run, a checkpoint or peft, it is pytorch_lora_weights.safetensors or else the only
    .safetensors file. Raises UserError that names `spec` and the config `key` or flag it came from.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        names = [each.name for each in path.iterdir()]
        return resolve_file(str(path / _choose(names, spec, key)), key)
    name = spec.removeprefix("hf://").rstrip("/")
    if path.is_file() or spec.startswith((".", "/", "~")) or "/" not in name:
        return resolve_file(spec, key)
    if name.endswith(".safetensors"):
        return resolve_file(f"hf://{name}", key)
    parts = name.split("/")
    folder = "".join(f"{part}/" for part in parts[2:])
    files = list_files("/".join(parts[:2]), key)
    inside = [file.removeprefix(folder) for file in files if file.startswith(folder)]
    chosen = _choose(inside, spec, key)
    if chosen == ADAPTER_WEIGHTS:  # means nothing without its config
        resolve_file(f"hf://{name}/{ADAPTER_CONFIG}", key)
    return resolve_file(f"hf://{name}/{chosen}", key)


def _choose(names: Sequence[str], spec: str, key: str) -> str:
    """The LoRA among the files of a folder; UserError where that could be several."""
    files = sorted(name for name in names if name.endswith(".safetensors"))
    here = [name for name in files if "/" not in name]
    if FILE_NAME in here or not files:
        return FILE_NAME  # which is reported where it is missing
    if len(here) == 1:
        return here[0]
    found = ", ".join(here or files)
    raise UserError(f"{key}: which LoRA of {spec}? Add one of these to its name: /{found}")


def read_lora(path: Path, backbone: Backbone, lora: Lora, key: str) -> dict[str, Tensor]:
    """The weights in `path` under the names of `lora`'s parameters, fp32, scaled to its alpha.

    Raises UserError where the file is damaged, or of another base model, rank or set of modules.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        default = json.loads(header.get("lora_adapter_metadata", "{}")).get("unet.lora_alpha")
        state, alphas = backbone.lora_state_dict(weights)
        unet = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
        found = parameter_names(convert_unet_state_dict_to_peft(unet))
    except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{key}: {path} cannot be read as a LoRA: {error}") from error
    if len(unet) < len(state):
        raise UserError(f"{key}: {path} also changes the text encoder, which is not trained here.")
    _check_fit(path, found, lora, key)
    alphas = {_module_of_alpha(name): float(alpha) for name, alpha in alphas.items()}
    result = {}
    for name, parameter in lora.parameters.items():
        tensor = found[name].to(parameter.device, torch.float32)
        module, is_b, _ = name.partition(".lora_B")
        if is_b:
            tensor = tensor * (alphas.get(module, default or lora.rank) / lora.alpha)
        result[name] = tensor
    return result


def _module_of_alpha(name: str) -> str:
    """The module that diffusers' name of a kohya alpha belongs to.

    unet.X.processor.to_q_lora.down.weight.alpha -> X.to_q, but to_out_lora -> to_out.0.
    """
    name = name.removeprefix("unet.").removesuffix(".alpha").removesuffix(".down.weight")
    head, is_processor, projection = name.partition(".processor.")
    if not is_processor:
        return name
    projection = projection.removesuffix("_lora")
    return f"{head}.to_out.0" if projection == "to_out" else f"{head}.{projection}"


def _check_fit(path: Path, found: Mapping[str, Tensor], lora: Lora, key: str) -> None:
    wanted = lora.parameters
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing or unknown:
        example = min(missing or unknown)
        raise UserError(
            f"{key}: {path} has {len(unknown)} tensors that this base model and "
            f"lora.target_modules do not have, and lacks {len(missing)} (e.g. {example})."
        )
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise UserError(
                f"{key}: {path} has {tuple(found[name].shape)} for {name}, but lora.rank="
                f"{lora.rank} on this base model needs {tuple(parameter.shape)}."
            )
