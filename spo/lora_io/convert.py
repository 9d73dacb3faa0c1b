"""Converting a LoRA to another format, and merging a LoRA into its base model."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from spo.atomic import new_output
from spo.errors import LOAD_ERRORS, UserError
from spo.lora_io.find import find_lora, layer_of
from spo.lora_io.names import network_of
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import WRITERS, LoraWeights
from spo.models.loading import ModelSource, family_of, load_pipeline
from spo.models.single_file import is_single_file, read_single_file
from spo.models.weights import fetch, stored_dtype

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
        lora = replace(lora, header={"base_model": base} | dict(lora.header))
    if dtype is not None:
        lora = lora.cast(_DTYPES[dtype])
    with new_output(output) as path:
        WRITERS[to](lora, path)


def merged_pipeline(
    lora: LoraWeights, base: str, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Returns the pipeline of `base` with W + alpha / rank B A for each W that the LoRA changes.

    Computed in fp32, then rounded to `dtype`; None: the dtype that the base's UNet is stored in.
    Without a safety checker. Raises UserError if base and LoRA do not fit.
    """
    family = family_of(base, "--base")
    dtype = dtype or _stored_dtype(base)
    try:
        pipe = load_pipeline(ModelSource(base), family, torch.float32)
    except UserError as error:
        raise UserError(f"--base: {error}") from error
    for name, module in lora.modules.items():
        layer = layer_of(getattr(pipe, network_of(name), nn.Module()), name, module, "--base")
        product = module.up.float().flatten(1) @ module.down.float().flatten(1)
        layer.weight.data += (module.alpha / module.rank * product).view_as(layer.weight)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own `to` warns of modules that no part has
    return pipe


def _stored_dtype(base: str) -> torch.dtype:
    try:
        if is_single_file(base):
            return read_single_file(base, "--base").dtype
        return stored_dtype(fetch(base, ["unet"], "--base") / "unet")
    except (UserError, *LOAD_ERRORS) as error:
        raise UserError(f"--dtype: say in which to store the model, as: {error}") from error
