"""A LoRA and its base model: whether they fit, and the base model with the LoRA merged in."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import model_file
from spo.lora_io.find import layer_of
from spo.lora_io.names import network_of
from spo.lora_io.write import LoraModule, LoraWeights
from spo.models.backbone import ModelSource, family_of, load_pipeline

_UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def check_fit(lora: LoraWeights, base: str) -> None:
    """Raise UserError unless the UNet of `base`, a folder or Hub id, has the LoRA's modules.

    Reads two small json files, no weights.
    """
    family_of(base, "--base")  # an error where it is another kind of pipeline
    file = model_file(base, "unet/config.json", "--base")
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(file))
    except LOAD_ERRORS as error:
        raise UserError(f"--base: {file} makes no UNet: {first_line(error)}") from error
    for name, module in lora.modules.items():
        if network_of(name) == "unet":
            layer_of(unet, name, module, "--base")


def merged_pipeline(
    lora: LoraWeights, base: str, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """The pipeline of `base` with W + alpha / rank B A for each W that the LoRA changes.

    Computed in fp32, then rounded to `dtype`; None: that in which the base's UNet is stored. Without
    a safety checker. Raises UserError where base and LoRA do not fit.
    """
    check_fit(lora, base)
    dtype = dtype or _stored_dtype(base)
    try:
        pipe = load_pipeline(ModelSource(base), family_of(base, "--base"), torch.float32)
    except UserError as error:
        raise UserError(f"--base: {error}") from error
    for name, module in lora.modules.items():
        network = getattr(pipe, network_of(name), None)
        if network is None:
            raise UserError(f"--base: the LoRA changes {name}, but the model has no such part.")
        layer = layer_of(network, name, module, "--base")
        layer.weight.data += _change(module).view_as(layer.weight)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own `to` warns of modules that none of these has
    return pipe


def _change(module: LoraModule) -> Tensor:
    product = module.up.float().flatten(1) @ module.down.float().flatten(1)
    return module.alpha / module.rank * product


def _stored_dtype(base: str) -> torch.dtype:
    try:
        with safe_open(model_file(base, _UNET_WEIGHTS, "--base"), framework="pt") as file:
            return _DTYPES[file.get_slice(next(iter(file.keys()))).get_dtype()]
    except (UserError, SafetensorError, KeyError) as error:
        raise UserError(f"--dtype: say in which to store the model, as: {error}") from error
