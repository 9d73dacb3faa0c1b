"""Converting a LoRA to another format, and merging a LoRA into its base model."""

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from spo.atomic import new_output, replacing
from spo.errors import LOAD_ERRORS, UserError
from spo.hub import list_files, model_file
from spo.lora_io.find import find_lora, layer_of
from spo.lora_io.names import network_of
from spo.lora_io.read import not_finite, read_lora_file
from spo.lora_io.write import KOHYA_FILE, WRITERS, LoraWeights
from spo.models.families import FAMILIES
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
        with new_output(output) as path:
            _save(merged_pipeline(lora, base, _DTYPES[dtype]), base, path)
        return
    if to == "kohya" and lora.shape_family() is None:
        lora = replace(lora, family=_family(lora, base))
    if base:
        lora = replace(lora, header={"base_model": base} | dict(lora.header))
    if dtype is not None:
        lora = lora.cast(_DTYPES[dtype])
        _check_finite(lora.tensors(), f"--dtype: {dtype} cannot hold the numbers of")
    with new_output(output) as path:
        WRITERS[to](lora, path)


def write_kohya_beside(file: Path, family: str) -> None:
    """Writes the LoRA `file` of a run once more, for programs that read kohya's names."""
    lora = replace(read_lora_file(file, "LoRA"), family=family)
    with replacing(file.with_name(KOHYA_FILE)) as path:
        WRITERS["kohya"](lora, path)


def _family(lora: LoraWeights, base: str | None) -> str:
    """Returns the family that `base`, or the file's header, states; UserError if neither does."""
    model = base or lora.header.get("base_model", "")
    known = {family.base_model: name for name, family in FAMILIES.items()}
    if stated := known.get(model) or (lora.family if base is None else family_of(base, "--base")):
        return stated
    with contextlib.suppress(UserError):
        return family_of(model, "--base")
    raise UserError(
        "--base: name the base model, as the LoRA does not tell whether it is of SD1.5 or SDXL, "
        "which have other names in kohya's format."
    )


def _check_finite(tensors: Mapping[str, Tensor], fault: str) -> None:
    if name := not_finite(tensors):
        raise UserError(f"{fault} {name}.")


def _save(pipe: DiffusionPipeline, base: str, folder: Path) -> None:
    """Saves `pipe` as `base` may be stored itself: for older libraries, and without local paths."""
    pipe.save_pretrained(folder, max_shard_size="20GB")  # one file each, as base models have
    # A LoRA leaves tokenizers as they are, and transformers 5 saves them in a form of its own.
    files = [path.relative_to(base).as_posix() for path in Path(base).glob("*/*")]
    if not (files or is_single_file(base)):
        files = list_files(base, "--base")
    for name in files:
        if re.fullmatch(r"tokenizer(_2)?/[^/]+", name):
            shutil.copyfile(model_file(base, name, "--base"), folder / name)
    for tokenizer in folder.glob("tokenizer*"):
        if not (tokenizer / "vocab.json").exists():
            getattr(pipe, tokenizer.name).backend_tokenizer.model.save(str(tokenizer))
    for config in (folder / "model_index.json", *folder.glob("*/*config.json")):
        values = json.loads(config.read_text())
        public = {k: value for k, value in values.items() if not k.endswith("name_or_path")}
        if public != values:
            config.write_text(json.dumps(public, indent=2) + "\n")
    for weights in folder.glob("*/*.safetensors"):  # the library makes them readable for one user
        shutil.copymode(folder / "model_index.json", weights)


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
    parts = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        _check_finite(part.state_dict(), f"--base: numbers are not finite in the {name}'s")
    for name, module in lora.modules.items():
        layer = layer_of(getattr(pipe, network_of(name), nn.Module()), name, module, "--base")
        product = module.up.float().flatten(1) @ module.down.float().flatten(1)
        layer.weight.data += (module.alpha / module.rank * product).view_as(layer.weight)
    for name, part in parts.items():
        nn.Module.to(part, dtype)  # diffusers' own `to` warns of modules that no part has
        fault = f"--dtype: choose fp32, as {dtype} cannot hold the numbers of the merged {name}'s"
        _check_finite(part.state_dict(), fault)
    return pipe


def _stored_dtype(base: str) -> torch.dtype:
    try:
        if is_single_file(base):
            return read_single_file(base, "--base").dtype
        return stored_dtype(fetch(base, ["unet"], "--base") / "unet")
    except (UserError, *LOAD_ERRORS) as error:
        raise UserError(f"--dtype: say in which to store the model, as: {error}") from error
