"""Base models of diffusers: checked by their small files, then loaded and frozen."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME as SCHEDULER
from torch import nn

from spo.command_line.values import expand
from spo.errors import LOAD_ERRORS, UserError
from spo.hub import PREFETCH, model_file
from spo.models.decoder import check_decoder, vae_without_weights
from spo.models.families import FAMILIES
from spo.models.kind import check_kind
from spo.models.single_file import is_single_file, read_single_file
from spo.models.weights import PARTS, fetch, load_part, reason

_PIPELINES = {name: getattr(diffusers, family.pipeline) for name, family in FAMILIES.items()}


_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")  # the last has the safety checker


@dataclass(frozen=True)
class ModelSource:
    """Names of a base model and its parts; `config.pretrained` explains each."""

    model: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    unet: str | None = None  # a repo or folder whose subfolder `unet` replaces the model's own
    decoder: str | None = None  # config.sample.decoder
    decodes: bool = True  # False: no VAE is loaded


def model_source(
    pretrained: Mapping[str, str | None], decoder: str | None = None, decodes: bool = True
) -> ModelSource:
    """Returns the source that `config.pretrained` describes, ~ expanded; `decoder` for candidates."""
    paths = {name: expand(pretrained[name]) for name in ("model", "vae")}
    return ModelSource(**{**pretrained, **paths}, decoder=expand(decoder), decodes=decodes)


def family_of(model: str, key: str) -> str:
    """Returns the family of a folder, Hub id or file; UserError that names `key` if it has none."""
    if is_single_file(model):
        return read_single_file(model, key).family
    found = read_json(model_file(model, "model_index.json", key), key).get("_class_name")
    for family, pipeline in _PIPELINES.items():
        if pipeline.__name__ == found:
            return family
    raise UserError(f"{key}: {model!r} is a {found}, not an SD1.5 or SDXL pipeline.")


def check_source(
    source: ModelSource, family: str, key: str = "pretrained.model"
) -> dict[str, dict[str, Any]]:
    """Returns the configs of the parts of a text-to-image model of `family`, by their folders.

    Raises UserError that names `key` if `source` is another kind of model. Reads only small json files,
    and the header of a single file.
    """
    if family not in _PIPELINES:
        raise UserError(f"family: {family!r} is none of {', '.join(_PIPELINES)}.")
    model, file = source.model, None
    if is_single_file(model):
        file = read_single_file(model, key, source.revision)
        model = str(file.configs)
    index = read_json(model_file(model, "model_index.json", key, source.revision), key)
    found, wanted = index.get("_class_name"), _PIPELINES[family].__name__
    if file and file.family != family:
        found = _PIPELINES[file.family].__name__
    if found != wanted:
        raise UserError(
            f"{key}: {source.model!r} is a {found}, but family={family!r} needs a {wanted}; change "
            "the model or family."
        )
    paths = _config_files(source, model, _networks(index, key), key)
    configs = {name: read_json(path, key) for name, path in paths.items()}
    if file is not None:
        configs["scheduler"] |= file.schedule
        configs["unet"]["in_channels"] = file.channels
    if source.decoder is not None:
        check_decoder(source.decoder, paths["vae"])
    try:
        check_kind(family, configs)
    except ValueError as error:
        raise UserError(f"{key}: {source.model!r} cannot be used: {error}.") from error
    return configs


def _config_files(
    source: ModelSource, model: str, networks: Iterable[str], key: str
) -> dict[str, Path]:
    """Returns the config files of the parts of `source`, whose folder is `model`."""
    replaced = {name for name in ("vae", "unet") if getattr(source, name) is not None}
    files = {name: f"{name}/config.json" for name in sorted(set(networks) - replaced)}
    files["scheduler"] = f"scheduler/{SCHEDULER}"
    try:
        paths = {n: model_file(model, path, key, source.revision) for n, path in files.items()}
    except UserError as error:
        what = f"{key.partition('.')[0]}: a config file of {source.model!r} cannot be read"
        raise UserError(f"{what} ({error})") from error
    if source.vae is not None:
        paths["vae"] = model_file(source.vae, "config.json", "pretrained.vae")
    if source.unet is not None:
        paths["unet"] = model_file(source.unet, "unet/config.json", key)
    return paths


def read_json(file: Path, key: str) -> dict[str, Any]:
    """Returns the content of a config file; UserError that names `key` unless it is an object."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{key}: {file} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {file} is not an object of JSON.")
    return content


def _networks(index: Mapping[str, Any], key: str) -> dict[str, type]:
    """Returns the classes of the networks that a model_index.json names, without a safety checker."""
    classes = {}
    for name, entry in index.items():
        match entry:
            case ["diffusers" | "transformers" as library, str(kind)] if name in PARTS:
                found = getattr({"diffusers": diffusers}.get(library, transformers), kind, None)
                if not (isinstance(found, type) and issubclass(found, nn.Module)):
                    raise UserError(f"{key}: model_index.json has an unknown {name}, {kind}.")
                classes[name] = found
            case [str(library), _] if library not in _LIBRARIES:  # diffusers would import it
                raise UserError(f"{key}: model_index.json has a {name} of {library!r}.")
    if missing := {"unet", "vae"} - classes.keys():
        raise UserError(f"{key}: model_index.json names no {min(missing)} of diffusers.")
    return classes


def load_pipeline(
    source: ModelSource, family: str, dtype: torch.dtype
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """Loads the diffusers pipeline of a base model, on the CPU, frozen, without a safety checker.

    Raises UserError if weights are missing or malformed.
    """
    try:
        pipe = _load(source, family, dtype)
    except LOAD_ERRORS as error:
        raise UserError(
            f"pretrained: {source.model!r} (vae {source.vae!r}, unet {source.unet!r}) cannot be loaded "
            f"({reason(error)}); to download and check it: {PREFETCH}"
        ) from error
    for name in ("tokenizer", "tokenizer_2"):
        if tokenizer := pipe.components.get(name):
            encoder = pipe.components[name.replace("tokenizer", "text_encoder")]
            # Without a limit of its own, a tokenizer would pad a prompt to 10^30 tokens.
            if len(tokenizer) < 5:  # transformers is content with a folder without files
                raise UserError(f"pretrained: {source.model!r} has no vocabulary in its {name}.")
            limit = encoder.config.max_position_embeddings
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return freeze(pipe, family, dtype)


def _load(source: ModelSource, family: str, dtype: torch.dtype) -> DiffusionPipeline:
    key, parts = "pretrained.model", {}
    if not source.decodes:
        parts["vae"] = vae_without_weights(check_source(source, family)["vae"])
    elif source.vae is not None:
        root = fetch(source.vae, [""], "pretrained.vae")
        parts["vae"] = load_part(AutoencoderKL, root, "", dtype)
    if source.unet is not None:
        root = fetch(source.unet, ["unet"], key)
        parts["unet"] = load_part(UNet2DConditionModel, root, "unet", dtype)
    if family == "sd15":
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    if is_single_file(source.model):
        return read_single_file(source.model, key, source.revision).load(dtype, **parts)
    index = read_json(model_file(source.model, "model_index.json", key, source.revision), key)
    networks = {name: kind for name, kind in _networks(index, key).items() if name not in parts}
    folders = ["scheduler", "tokenizer", "tokenizer_2", *networks]
    root = fetch(source.model, folders, key, source.variant, source.revision)
    for name, kind in networks.items():
        parts[name] = load_part(kind, root, name, dtype, source.variant)
    return _PIPELINES[family].from_pretrained(root, trust_remote_code=False, **parts)


def freeze(pipe: DiffusionPipeline, family: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Freezes `pipe`, and converts a VAE that would overflow to fp32."""
    # SDXL's own VAE overflows in fp16 and its config says so; SD1.5's does not and has the same flag.
    if family == "sdxl" and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe
