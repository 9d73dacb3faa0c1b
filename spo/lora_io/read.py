"""Reading LoRA files of all formats: ours, diffusers' old and new ones, kohya's, peft's."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.lora_io.names import from_kohya, is_module, network_of
from spo.lora_io.write import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TARGETS, LoraModule, LoraWeights
from spo.models.families import FAMILIES

# Header entries that belong to a format, not to the LoRA.
_OF_FORMAT = {"format", "lora_adapter_metadata", TARGETS}
_OF_FORMAT |= {"ss_base_model_version", "ss_v2", "modelspec.architecture"}
# Beginnings of kohya's names that sd-scripts gives to the modules of one family alone.
_KOHYA_OF = {"sd15": ("lora_te_",), "sdxl": ("lora_te1_", "lora_unet_input_", "lora_unet_output_")}
_FP32_MAX = torch.finfo(torch.float32).max
# In other layers, a kernel of 1 x 1 stands for a matrix.
_MAYBE_CONVOLUTION = re.compile(r"conv|proj_(?:in|out)$")
_KOHYA_KEY = re.compile(r"(lora_(?:unet|te[12]?)_\w+)\.(?:lora_(up|down)\.weight|(alpha))")
# X.lora_A of today, X.lora.down and X.processor.to_q_lora.down of older diffusers, and
# X.lora_linear_layer.down of text encoders.
_DOTTED_KEY = re.compile(
    r"(?:base_model\.model\.)?(.+?)(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(A|B|down|up)\.weight"
)

_READ_ERRORS = (*LOAD_ERRORS, TypeError, AttributeError, OverflowError)  # of a hostile file, too


def read_lora_file(path: Path, key: str) -> LoraWeights:
    """Returns the LoRA in the safetensors file `path`; peft's adapter_config.json lies beside it.

    Raises UserError, which names the flag or config `key`, if the file is damaged, if any tensor in it
    is none of a LoRA of an SD1.5 or SDXL pipeline, or if any number is not finite.
    """
    if path.suffix != ".safetensors":
        raise UserError(
            f"{key}: {path} is no .safetensors file; others can run code when they are read."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        adapters = _adapters(path, header)
        modules = _modules(tensors, adapters)
        unet = adapters.get("unet", {})
        targets = _targets(modules, header, unet)
    except _READ_ERRORS as error:
        raise UserError(f"{key}: {path} cannot be read as a LoRA: {first_line(error)}") from error
    origin = {name: value for name, value in header.items() if name not in _OF_FORMAT}
    if isinstance(base := unet.get("base_model_name_or_path"), str):
        origin.setdefault("base_model", base)
    return LoraWeights(modules, origin, targets, _stated_family(header, tensors))


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with a number that is NaN, or infinite in fp32."""
    return next((name for name, each in tensors.items() if not each.float().isfinite().all()), None)


def _stated_family(header: Mapping[str, str], keys: Iterable[str]) -> str | None:
    stated = {header.get("ss_base_model_version"), header.get("modelspec.architecture")}
    for name, family in FAMILIES.items():
        if stated & {family.kohya_version, family.architecture}:
            return name
    return next((n for n, own in _KOHYA_OF.items() if any(k.startswith(own) for k in keys)), None)


def _adapters(path: Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Returns rank and alpha of each network as the file states them, in peft's LoraConfig."""
    if path.name == ADAPTER_WEIGHTS:
        return {"unet": json.loads((path.parent / ADAPTER_CONFIG).read_text())}
    adapters: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in json.loads(header.get("lora_adapter_metadata", "{}")).items():
        network, _, name = name.partition(".")
        adapters[network][name] = value
    return adapters


def _modules(tensors: Mapping[str, Tensor], adapters: Mapping[str, dict]) -> dict[str, LoraModule]:
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        module, part = _place(name)
        if is_module(module) and part not in parts[module]:
            parts[module][part] = tensor
        else:
            unknown.append(name)
    if unknown or not parts:
        raise ValueError(
            f"{len(unknown)} of its {len(tensors)} keys name no LoRA weight of an SD1.5 or SDXL "
            f"pipeline, the first {min(unknown, default=None)}."
        )
    if found := not_finite(tensors):
        raise ValueError(f"{found} has numbers that are not finite.")
    return {n: _module(n, parts[n], adapters.get(network_of(n), {})) for n in sorted(parts)}


def _place(key: str) -> tuple[str, str]:
    """Returns the module that a tensor belongs to, and the tensor's part: down, up or alpha.

    The key of a tensor of no LoRA gives a name of no module.
    """
    if found := _KOHYA_KEY.fullmatch(key):
        return from_kohya(found[1]), found[2] or found[3]
    found = _DOTTED_KEY.fullmatch(key)
    if found is None:
        return "", ""
    name = found[1].replace(".processor.", ".")
    if not name.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
        name = f"unet.{name}"
    if network_of(name) == "unet":
        name = re.sub(r"\.to_out$", ".to_out.0", name)
    else:
        name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
        name = re.sub(r"^(\w+)\.encoder\.", r"\1.text_model.encoder.", name)
    return name, {"A": "down", "B": "up"}.get(found[2], found[2])


def _module(name: str, parts: Mapping[str, Tensor], adapter: Mapping[str, Any]) -> LoraModule:
    for part in ("down", "up"):
        if part not in parts:
            raise ValueError(f"it has {' and '.join(sorted(parts))} for {name}, but no {part}.")
    down, up = parts["down"], parts["up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or not 0 < up.shape[1] == down.shape[0]:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise ValueError(f"it has {shapes} for {name}: not of one rank.")
    if down.ndim == 4 and not _MAYBE_CONVOLUTION.search(name) and down.shape[2:] == (1, 1):
        down, up = down.flatten(1), up.flatten(1)  # some programs write every matrix as a kernel
    if "alpha" in parts:
        value = parts["alpha"].item()
    elif adapter.get("use_rslora") or adapter.get("use_dora"):
        raise ValueError("it is of a kind that only peft knows (use_rslora, use_dora).")
    else:
        value = _stated_alpha(name.removeprefix(f"{network_of(name)}."), adapter, down.shape[0])
    alpha = float(value)
    largest = float(up.float().abs().max()) * alpha / down.shape[0]
    if not 0 < alpha < _FP32_MAX or not largest < _FP32_MAX:
        raise ValueError(f"it has alpha {value} for {name}, no number above 0 that fp32 can use.")
    return LoraModule(down, up, alpha)


def _stated_alpha(name: str, adapter: Mapping[str, Any], rank: int) -> Any:
    """Returns the alpha of a module, as peft reads it from a config whose patterns are plain names.

    In peft they are regular expressions, and one in a file from anywhere could run for ever.
    """
    patterns = adapter.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("its alpha_pattern does not give alphas by names.")
    for pattern, alpha in patterns.items():
        ending = pattern.removeprefix("^").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", ending):
            raise ValueError(f"its alpha_pattern has {pattern!r}, which is no name of a module.")
        if name == ending or (pattern[0] != "^" and name.endswith(f".{ending}")):
            return alpha
    return adapter.get("lora_alpha", rank)


def _targets(
    modules: Mapping[str, LoraModule], header: Mapping[str, str], adapter: Mapping[str, Any]
) -> tuple[str, ...]:
    """Returns the endings of module names that the file states, if all its modules have them."""
    try:
        targets = adapter.get(TARGETS) or json.loads(header.get(TARGETS, "[]"))
    except (ValueError, RecursionError):
        return ()
    names = [f".{name}" for name in modules if network_of(name) == "unet"]
    if not names or not isinstance(targets, list):  # peft also has regular expressions
        return ()
    endings = tuple(f".{target}" for target in targets if isinstance(target, str))
    fit = len(endings) == len(targets) and all(name.endswith(endings) for name in names)
    return tuple(sorted(targets)) if fit else ()
