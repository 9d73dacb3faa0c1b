"""Base models of diffusers: checked by their small files, then loaded and frozen."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from spo.command_line.values import expand
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import PREFETCH, model_file
from spo.models.decoder import check_decoder
from spo.models.families import FAMILIES

_PIPELINES = {name: getattr(diffusers, family.pipeline) for name, family in FAMILIES.items()}


@dataclass(frozen=True)
class ModelSource:
    """Names of a base model and its parts; `config.pretrained` explains each."""

    model: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    unet: str | None = None  # a repo or folder whose subfolder `unet` replaces the model's own
    decoder: str | None = None  # config.sample.decoder


def model_source(pretrained: Mapping[str, str | None], decoder: str | None = None) -> ModelSource:
    """Returns the source that `config.pretrained` describes, ~ expanded; `decoder` for candidates."""
    paths = {name: expand(pretrained[name]) for name in ("model", "vae")}
    return ModelSource(**{**pretrained, **paths}, decoder=expand(decoder))


def family_of(model: str, key: str) -> str:
    """Returns the family of a folder or Hub id; UserError that names `key` if it has none."""
    found = _class_name(model, key)
    for family, pipeline in _PIPELINES.items():
        if pipeline.__name__ == found:
            return family
    raise UserError(f"{key}: {model!r} is a {found}, not an SD1.5 or SDXL pipeline.")


def check_source(source: ModelSource, family: str, key: str = "pretrained.model") -> None:
    """Raises UserError that names `key` unless `source` is a pipeline of `family`.

    Reads only small json files.
    """
    if family not in _PIPELINES:
        raise UserError(f"family: {family!r} is none of {', '.join(_PIPELINES)}.")
    vae = None
    if source.vae is not None:
        vae = model_file(source.vae, "config.json", "pretrained.vae")
    found = _class_name(source.model, key, source.revision)
    wanted = _PIPELINES[family].__name__
    if found != wanted:
        raise UserError(
            f"{key}: {source.model!r} is a {found}, but family={family!r} needs a {wanted}; change "
            "the model or family."
        )
    if source.decoder is not None:
        own = vae or model_file(source.model, "vae/config.json", key, source.revision)
        check_decoder(source.decoder, own)


def _class_name(model: str, key: str, revision: str | None = None) -> str | None:
    file = model_file(model, "model_index.json", key, revision)
    try:
        return json.loads(file.read_text()).get("_class_name")
    except ValueError as error:
        raise UserError(f"{key}: {file} is not a JSON file: {error}") from error


def load_pipeline(
    source: ModelSource, family: str, dtype: torch.dtype
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Loads the diffusers pipeline of a base model, on the CPU, frozen, without a safety checker.

    Raises UserError if weights are missing or malformed.
    """
    options = {"dtype": dtype, "revision": source.revision, "variant": source.variant}
    if family == "sd15":
        options |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    try:
        if source.vae is not None:
            options["vae"] = AutoencoderKL.from_pretrained(source.vae, dtype=dtype)
        if source.unet is not None:
            options["unet"] = UNet2DConditionModel.from_pretrained(
                source.unet, subfolder="unet", dtype=dtype
            )
        pipe = _PIPELINES[family].from_pretrained(source.model, **options)
    except LOAD_ERRORS as error:
        raise UserError(
            f"pretrained: {source.model!r} (vae {source.vae!r}, unet {source.unet!r}) cannot be loaded "
            f"({first_line(error)}); to download and check it: {PREFETCH}"
        ) from error
    return freeze(pipe, family, dtype)


def freeze(pipe: DiffusionPipeline, family: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Freezes `pipe`, and converts a VAE that would overflow to fp32."""
    # SDXL's own VAE overflows in fp16 and its config says so; SD1.5's does not and has the same flag.
    if family == "sdxl" and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe
