"""Models by a short text: the base, the base with LoRAs or with another UNet, a whole pipeline.

[NAME=]base, [NAME=]LORA[:WEIGHT][+LORA[:WEIGHT]...], [NAME=]PIPELINE, [NAME=]UNET, where each is a
folder or a Hub id, and a LORA a file too; [NAME=]FOLDER of images that have been drawn already.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

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


def read_specs(texts: Iterable[str], base: ModelSource, family: str, key: str) -> list[ModelSpec]:
    """Returns the models that `texts` name; raises UserError that names the config `key`."""
    specs: list[ModelSpec] = []
    for text in texts:
        spec = _read(text, base, family, key)
        if any(spec.name == other.name for other in specs):
            raise UserError(
                f"{key}: two models are called {spec.name!r}; give one another name: NAME={text}"
            )
        specs.append(spec)
    if not specs:
        raise UserError(f"{key}: there is no model; name at least one, e.g. base.")
    return specs


def _read(text: str, base: ModelSource, family: str, key: str) -> ModelSpec:
    head, equals, location = text.partition("=")
    name, location = (head, location) if equals else ("", text)
    name = name or _default_name(location)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(
            f"{key}: {name!r} is no name for a model; write NAME={location}, where NAME has "
            "letters, digits, _, - and dots."
        )
    if location == "base":
        return ModelSpec(name, text, base)
    folder = Path(location).expanduser()
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
    loras = tuple(_read_lora(part, key) for part in location.split("+"))
    if is_checkpoint(loras[0][0]) and len(loras) == 1:
        check_source(source := ModelSource(str(loras[0][0])), family, key)
        return ModelSpec(name, text, source)
    return ModelSpec(name, text, base, loras)


def _default_name(location: str) -> str:
    """Returns the last part of a path or Hub id; for a run's EMA, with the run before it."""
    parts = [part for part in location.partition(":")[0].split("/") if part]
    last = "_".join(parts[-2:]) if parts[-1:] == ["ema"] else "".join(parts[-1:])
    return last.removesuffix(".safetensors")


def _holds_images(files: Iterable[str]) -> bool:
    """Returns whether a folder holds images and nothing that could be a model."""
    names = [name for name in files if "/" not in name]
    is_model = any(name.endswith((".safetensors", ".bin")) for name in names)
    has_images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    return has_images and not is_model and "model_index.json" not in names


def _read_lora(part: str, key: str) -> tuple[Path, float]:
    weighted = re.fullmatch(r"(.+):(-?\d*\.?\d+)", part)
    location, weight = weighted.groups() if weighted else (part, 1)
    return find_lora(location, key), float(weight)


def use_loras(backbone: Backbone, spec: ModelSpec, key: str) -> None:
    """Puts the LoRAs of `spec` into its base model; raises UserError if one does not fit."""
    loras = [(read_folded(path, backbone, key), weight) for path, weight in spec.loras]
    try:
        backbone.use_loras(loras)
    except LOAD_ERRORS as error:
        raise UserError(f"{key}: {spec.text} cannot be loaded ({first_line(error)}).") from error
