"""Models by a short text: the base, the base with LoRAs or with another UNet, a whole pipeline.

[NAME=]base, [NAME=]LORA[:WEIGHT][+LORA[:WEIGHT]...], [NAME=]PIPELINE, [NAME=]UNET, where each is a
folder or a Hub id, and a LORA a file too; [NAME=]FOLDER of images that have been drawn already.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spo.command_line.values import expand
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import is_hub_id, list_files
from spo.lora_io.find import find_lora, read_folded
from spo.models.backbone import Backbone
from spo.models.loading import ModelSource, check_source
from spo.models.single_file import is_checkpoint

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class ModelSpec:
    """A model that draws images, or a folder of images that one has drawn."""

    name: str
    text: str  # as the user wrote it
    source: ModelSource | None  # None: the model is a folder, `images`
    loras: tuple[tuple[Path, float], ...] = ()  # files, and their strengths
    images: Path | None = None
    lora: str = ""  # what `loras` are, without NAME= and, of one LoRA, without its strength
    strength: float | None = None  # of `lora`; 0: the base model itself; None: another model


def read_specs(texts: Iterable[str], base: ModelSource, family: str, key: str) -> list[ModelSpec]:
    """Returns the models that `texts` name; raises UserError that names the config `key`."""
    specs = [_read(text, base, family, key) for text in texts]
    if not specs:
        raise UserError(f"{key}: there is no model; name at least one, e.g. base.")
    _check_names(specs, key)
    return specs


def at_strengths(
    specs: Sequence[ModelSpec], strengths: Sequence[float], key: str
) -> list[ModelSpec]:
    """Returns `specs`, each with a LoRA once for every one of `strengths`, which its own multiplies.

    Without strengths nothing changes. Raises UserError that names the config `key`.
    """
    if not all(map(math.isfinite, strengths)):
        raise UserError(f"{key}: every strength must be a finite number.")
    if strengths and not any(spec.loras for spec in specs):
        raise UserError(f"{key}: there is no LoRA among the models; name one, e.g. runs/NAME.")
    scaled = []
    for spec in specs:
        for scale in dict.fromkeys(strengths) if spec.loras else ():
            loras = tuple((path, scale * weight) for path, weight in spec.loras)
            name, strength = f"{spec.name}_{scale:g}", scale * spec.strength
            scaled.append(replace(spec, name=name, loras=loras, strength=strength))
        scaled += [] if spec.loras and strengths else [spec]
    _check_names(scaled, key)
    return scaled


def _check_names(specs: Sequence[ModelSpec], key: str) -> None:
    for i, spec in enumerate(specs):
        if any(spec.name == other.name for other in specs[:i]):
            raise UserError(
                f"{key}: two models are called {spec.name!r}; give one another name: "
                f"NAME={spec.text}"
            )


def _read(text: str, base: ModelSource, family: str, key: str) -> ModelSpec:
    name, parts = split_spec(text)
    location = "+".join(parts)
    name = name or _default_name(location)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"{key}: {name!r} is no name for a model; write NAME={location}, where NAME has "
            "letters, digits, _, - and dots."
        )
    if location == "base":
        return ModelSpec(name, text, base, strength=0)
    folder = Path(expand(location))
    if folder.is_dir():
        where, found = str(folder), [*folder.glob("*"), *folder.glob("*/*")]
        files = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
        if _holds_images(files):
            return ModelSpec(name, text, None, images=folder)
    else:
        where, files = location, list_files(location, key) if is_hub_id(location) else []
    if "model_index.json" in files:
        check_source(source := ModelSource(where), family, key)
        return ModelSpec(name, text, source)
    if "unet/config.json" in files:  # as Diffusion-DPO is published
        return ModelSpec(name, text, replace(base, unet=where))
    loras = tuple((find_lora(each, key), weight) for each, weight in map(split_weight, parts))
    if is_checkpoint(loras[0][0]) and len(loras) == 1:
        check_source(source := ModelSource(str(loras[0][0])), family, key)
        return ModelSpec(name, text, source)
    lora, strength = split_weight(location) if len(loras) == 1 else (location, 1)
    return ModelSpec(name, text, base, loras, lora=lora, strength=strength)


def split_spec(text: str) -> tuple[str, list[str]]:
    """Returns NAME, or "", and each LORA[:WEIGHT] of a model's text; a path that exists stays whole."""
    parts = _split_parts(text)
    name, equals, location = text.partition("=")
    if not equals or _exists(parts[0]):
        return "", parts
    return name, _split_parts(location)


def _split_parts(location: str) -> list[str]:
    pieces = location.split("+")
    for end in range(len(pieces), 0, -1):
        part, rest = "+".join(pieces[:end]), pieces[end:]
        if end == 1 or _exists(part):
            return [part, *(_split_parts("+".join(rest)) if rest else [])]


def split_weight(part: str) -> tuple[str, float]:
    """Returns the place and the strength of LORA[:WEIGHT]."""
    weighted = re.fullmatch(r"(.+):(-?\d*\.?\d+)", part)
    if weighted is None or os.path.exists(expand(part)):
        return part, 1
    return weighted[1], float(weighted[2])


def _exists(part: str) -> bool:
    return os.path.exists(expand(split_weight(part)[0]))


def _default_name(location: str) -> str:
    """Returns the last part of a path or Hub id; for a run's EMA, with the run before it."""
    parts = [part for part in location.partition(":")[0].split("/") if part]
    last = "_".join(parts[-2:]) if parts[-1:] == ["ema"] else "".join(parts[-1:])
    return re.sub("[+=]", "_", last.removesuffix(".safetensors"))


def _holds_images(files: Iterable[str]) -> bool:
    """Returns whether a folder holds images and nothing that could be a model."""
    names = [name for name in files if "/" not in name]
    is_model = any(name.endswith((".safetensors", ".bin")) for name in names)
    has_images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    return has_images and not is_model and "model_index.json" not in names


def use_loras(backbone: Backbone, spec: ModelSpec, key: str) -> None:
    """Puts the LoRAs of `spec` into its base model; raises UserError if one does not fit."""
    loras = [(read_folded(path, backbone, key), weight) for path, weight in spec.loras]
    try:
        backbone.use_loras(loras)
    except LOAD_ERRORS as error:
        raise UserError(f"{key}: {spec.text} cannot be loaded ({first_line(error)}).") from error
