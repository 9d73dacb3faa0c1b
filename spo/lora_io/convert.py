"""Converting a LoRA to another format, and merging a LoRA into its base model."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn

from spo.atomic import new_output
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import model_file
from spo.lora_io.find import find_lora, layer_of
from spo.lora_io.names import network_of
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import WRITERS, LoraWeights
from spo.models.loading import ModelSource, family_of, load_pipeline

_UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, None: None}


def convert_lora(
    source: str, to: str | None, base: str | None, dtype: str | None, output: Path
) -> None:
    """Writes the LoRA that `source` names in the format `to`, or merged into `base` if None.

    `dtype` is "fp16", "bf16", "fp32", or None: as stored. Raises UserError before anything is written.
    """
    lora = read_lora_file(find_lora(source, "SOURCE"), "SOURCE")
    if to is None:
        pipe = merged_pipeline(lora, base, _DTYPES[dtype])
        with new_output(output) as path:
            pipe.save_pretrained(path, max_shard_size="20GB")  # one file each, as base models have
        return
    if base:
        check_fit(lora, base)
        lora = replace(lora, header={"base_model": base} | dict(lora.header))
    if dtype is not None:
        lora = lora.cast(_DTYPES[dtype])
    with new_output(output) as path:
        WRITERS[to](lora, path)


def check_fit(lora: LoraWeights, base: str) -> None:
    """Raises UserError unless the UNet of `base`, a folder or Hub id, has the LoRA's modules.

    Reads two small json files, no weights.
    """
    family_of(base, "--base")  # UserError for another kind of pipeline
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
    """Returns the pipeline of `base` with W + alpha / rank B A for each W that the LoRA changes.

    Computed in fp32, then rounded to `dtype`; None: the dtype that the base's UNet is stored in.
    Without a safety checker. Raises UserError if base and LoRA do not fit.
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
        product = module.up.float().flatten(1) @ module.down.float().flatten(1)
        layer.weight.data += (module.alpha / module.rank * product).view_as(layer.weight)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own `to` warns of modules that no part has
    return pipe


def _stored_dtype(base: str) -> torch.dtype:
    try:
        with safe_open(model_file(base, _UNET_WEIGHTS, "--base"), framework="pt") as file:
            return _STORED_DTYPES[file.get_slice(next(iter(file.keys()))).get_dtype()]
    except (UserError, SafetensorError, KeyError) as error:
        raise UserError(f"--dtype: say in which to store the model, as: {error}") from error
