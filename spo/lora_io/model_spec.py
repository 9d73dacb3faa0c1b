"""Models by a short text: the base, the base with LoRAs or with another UNet, a whole pipeline.

[NAME=]base, [NAME=]LORA[:WEIGHT][+LORA[:WEIGHT]...], [NAME=]PIPELINE, [NAME=]UNET, where each is a
folder or a Hub id, and a LORA a file too; [NAME=]FOLDER of images that are there already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import is_hub_id, list_files
from spo.lora_io.find import find_lora, read_folded
from spo.models.backbone import Backbone, ModelSource, check_source

_NAME = re.compile(r"\w[\w.-]*")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA and how strongly it is applied."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """A model that draws images, or a folder of images that one has drawn."""

    name: str
    text: str  # as it was asked for
    source: ModelSource | None  # None: `images` are there already
    loras: tuple[LoraFile, ...] = ()
    images: Path | None = None


def read_specs(texts: Iterable[str], base: ModelSource, family: str, key: str) -> list[ModelSpec]:
    """The models that `texts` name; UserError, naming the config `key`, for what is wrong with one."""
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
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{key}: {name!r} is no name for a model; write NAME={location}, where NAME has "
            "letters, digits, _, - and dots."
        )
    if location == "base":
        return ModelSpec(name, text, base)
    folder = Path(location).expanduser()
    if folder.is_dir() and (images := _image_folder(folder)):
        return ModelSpec(name, text, None, images=images)
    if folder.is_dir() or is_hub_id(location):
        where = str(folder) if folder.is_dir() else location
        files = _files(folder) if folder.is_dir() else list_files(location, key)
        if "model_index.json" in files:
            check_source(source := ModelSource(where), family, key)
            return ModelSpec(name, text, source)
        if "unet/config.json" in files:  # as Diffusion-DPO is published
            return ModelSpec(name, text, replace(base, unet=where))
    loras = tuple(_read_lora(part, key) for part in location.split("+"))
    return ModelSpec(name, text, base, loras)


def _default_name(location: str) -> str:
    """The last part of a path or Hub id, for a run's EMA with the run before it."""
    parts = [part for part in location.partition(":")[0].split("/") if part]
    last = "_".join(parts[-2:]) if parts[-1:] == ["ema"] else "".join(parts[-1:])
    return last.removesuffix(".safetensors")


def _files(folder: Path) -> list[str]:
    """The files in `folder` and in its subfolders, as the Hub names them."""
    found = (path for pattern in ("*", "*/*") for path in folder.glob(pattern))
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def _image_folder(folder: Path) -> Path | None:
    """`folder` where it holds images and nothing that could be a model."""
    names = [entry.name for entry in folder.iterdir()]
    is_model = any(name.endswith((".safetensors", ".bin")) for name in names)
    has_images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
    return folder if has_images and not is_model and "model_index.json" not in names else None


def _read_lora(part: str, key: str) -> LoraFile:
    location, weight = part, 1.0
    if match := re.fullmatch(r"(.+):(-?[\d.]+)", part):
        location = match[1]
        try:
            weight = float(match[2])
        except ValueError:
            raise UserError(f"{key}: {match[2]!r} of {part} is no weight of a LoRA.") from None
    return LoraFile(find_lora(location, key), weight)


def use_loras(backbone: Backbone, spec: ModelSpec, key: str) -> None:
    """Put the LoRAs of `spec` into its base model; UserError where one does not fit."""
    loras = [(read_folded(lora.path, backbone, key), lora.weight) for lora in spec.loras]
    try:
        backbone.use_loras(loras)
    except LOAD_ERRORS as error:
        raise UserError(f"{key}: {spec.text} cannot be loaded ({first_line(error)}).") from error
