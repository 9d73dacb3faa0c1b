"""One image per prompt, found in a folder or drawn batch by batch, each whole and with its prompt."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from spo.atomic import write_json
from spo.command_line.values import require_choice, require_whole
from spo.errors import UserError
from spo.evaluation.contents import lora_content
from spo.lora_io.model_spec import IMAGE_SUFFIXES, ModelSpec
from spo.models.backbone import DTYPES
from spo.models.plain_images import ImageSettings
from spo.run.pictures import open_picture, read_picture, write_png


@dataclass(frozen=True)
class DrawSettings(ImageSettings):
    """The settings that an image of an evaluation depends on; `config.sample` explains each."""

    batch_size: int  # as rounding depends on the other images of a batch
    mixed_precision: str

    def __post_init__(self) -> None:
        require_whole("sample.num_steps", self.num_steps)
        require_whole("sample.batch_size", self.batch_size)
        require_choice("mixed_precision", self.mixed_precision, DTYPES)


@dataclass(frozen=True)
class ImageSet:
    """The images of one model, one file per prompt."""

    name: str
    files: tuple[Path, ...]

    def missing(self, batch_size: int) -> list[range]:
        """Returns the batches of which an image is missing."""
        every = batches(len(self.files), batch_size)
        return [batch for batch in every if not all(self.files[i].exists() for i in batch)]

    def write(self, index: int, image: Image.Image, prompt: str, seed: int) -> None:
        """Saves the image of prompt `index`, whole or not at all."""
        text = {"prompt": prompt, "seed": str(seed), "model": self.name}
        write_png(self.files[index], image, text)

    def read(self, index: int, prompt: str) -> Image.Image:
        """Returns an image in RGB; raises UserError if it is none, or is of another prompt."""
        path = self.files[index]
        try:
            rgb = read_picture(path)
        except ValueError as error:
            reason = f"{path} is missing or is no image ({error})"
            raise UserError(f"{reason}; delete it and run this again to draw it.") from error
        shown = rgb.info.get("prompt", prompt)
        if shown != prompt:
            reason = f"{path} shows {shown!r}, but prompt {index} is {prompt!r}"
            raise UserError(f"{reason}: prompts.source does not match the images.")
        return rgb


def batches(total: int, size: int) -> list[range]:
    """Returns the numbers below `total` in batches; the same for any number of processes."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def image_set(folder: Path, spec: ModelSpec, prompts: Sequence[str]) -> ImageSet:
    """Returns the present and future images of `spec`; UserError for a wrong number in a folder."""
    if spec.images is None:
        files = tuple(folder / "images" / spec.name / f"{i:05d}.png" for i in range(len(prompts)))
        return ImageSet(spec.name, files)
    paths = [p for p in spec.images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    # 2.png comes before 10.png.
    paths.sort(key=lambda p: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", p.name)])
    if len(paths) != len(prompts):
        raise UserError(
            f"models: {spec.images} has {len(paths)} images for {len(prompts)} prompts of "
            "prompts.source; it takes one for each, in the order of their names."
        )
    for path in paths:
        try:
            open_picture(path).close()
        except ValueError as error:
            raise UserError(f"models: {path} cannot be scored as an image ({error}).") from error
    return ImageSet(spec.name, tuple(paths))


def claim_prompts(folder: Path, prompts: Sequence[str]) -> None:
    """Writes the prompts of an evaluation; raises UserError if the folder has other prompts."""
    if _first_written(folder / "prompts.json", prompts) != list(prompts):
        raise UserError(f"run_name: {folder} is an evaluation of other prompts; choose another.")


def claim_images(
    folder: Path, spec: ModelSpec, contents: Mapping[str, str], settings: DrawSettings
) -> None:
    """Writes what the images of `spec` depend on; raises UserError if the folder has others."""
    loras = [{"sha256": lora_content(path), "weight": weight} for path, weight in spec.loras]
    wanted = {**asdict(spec.source), **contents, "loras": loras, **asdict(settings)}
    if contents:
        del wanted["revision"]  # whether a commit was named, or was the newest then
    images = folder / "images" / spec.name
    found = _first_written(images / "model.json", wanted)
    changed = [key for key in wanted if wanted[key] != found.get(key)]
    if changed:
        raise UserError(
            f"models: {images} holds images of another {', '.join(changed)}; choose another "
            "NAME=, another run_name, or delete that folder."
        )


def _first_written(file: Path, content: Any) -> Any:
    """Returns what `file` holds; if it is missing, writes `content` into it first."""
    if not file.exists():
        write_json(file, content)
    return read_json(file)


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file of ours; raises UserError if it is damaged."""
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}); delete it, or choose another run_name."
        ) from error
