"""Validation images: fixed prompts and seeds, drawn again and again while the LoRA changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from spo.command_line.values import require_number, require_whole
from spo.data.prompts import read_prompts
from spo.models.backbone import Backbone
from spo.models.plain_images import ImageSettings, sample_images
from spo.run.folder import SAMPLES, SAMPLES_INDEX
from spo.run.pictures import Cell, grid, to_pil
from spo.run.session import Session

_COLUMNS = 4


@dataclass(frozen=True)
class ValidationSettings:
    """The validation images of a training run; `config.eval` explains each."""

    prompts: str
    num_images: int
    seed: int
    num_steps: int
    guidance_scale: float
    weights: str

    def __post_init__(self) -> None:
        require_whole("eval.num_images", self.num_images)
        require_number(
            "eval.num_steps",
            self.num_steps,
            "a whole number from 1 to 1000, the timesteps that models are trained with",
            lambda v: 1 <= v <= 1000,
        )
        require_number("eval.guidance_scale", self.guidance_scale, "0 or more", lambda v: v >= 0)

    @property
    def images(self) -> ImageSettings:
        """How the images are drawn."""
        return ImageSettings(self.num_steps, self.guidance_scale, self.seed)

    def read_prompts(self) -> tuple[str, ...]:
        """Reads the prompts to draw; UserError if there are none."""
        return read_prompts(self.prompts, key="eval.prompts").prompts[: self.num_images]


def draw_validation_images(
    session: Session,
    backbone: Backbone,
    prompts: Sequence[str],
    settings: ValidationSettings,
    epochs: int,
    step: int,
) -> None:
    """Draws the prompts with the UNet's current weights on all processes, and saves the images."""
    workers = session.workers
    mine = range(workers.rank, len(prompts), workers.count)
    watched = session.signals.watch(session.bar(mine, "validation images"))
    with workers.together():
        cells = draw_cells(backbone, prompts, watched, settings.images)
    cells = workers.gather_to_main(cells)

    def show() -> None:
        name = f"validation/epoch_{epochs:04d}_{settings.weights}"
        picture = validation_grid(cells, f"{settings.weights} LoRA after epoch {epochs}")
        session.picture(name, picture, step)
        save_samples(session.run_dir, cells, settings.weights, epochs)

    session.on_main(show)


def draw_cells(
    backbone: Backbone, prompts: Sequence[str], indices: Iterable[int], settings: ImageSettings
) -> list[tuple[int, Cell]]:
    """Draws the images of `prompts` at `indices` with the UNet's current weights, with their indices.

    One at a time, so that an image does not depend on its batch.
    """
    return [
        (i, Cell(to_pil(sample_images(backbone, [prompts[i]], [i], settings))[0], prompts[i]))
        for i in indices
    ]


def validation_grid(cells: Iterable[tuple[int, Cell]], title: str) -> Image.Image:
    """Joins cells from any number of processes into one picture, in the order of their indices."""
    row = [cell for _, cell in sorted(cells, key=lambda numbered: numbered[0])]
    rows = [row[start : start + _COLUMNS] for start in range(0, len(row), _COLUMNS)]
    return grid(rows, title)


def save_samples(
    run_dir: Path, cells: Iterable[tuple[int, Cell]], weights: str, epochs: int
) -> None:
    """Writes the images one by one with their prompts, in place of an earlier epoch's."""
    folder = run_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    prompts = {}
    for i, cell in cells:
        name = f"{i:02d}.png"
        cell.image.save(folder / name)
        prompts[name] = cell.caption
    index = {"weights": weights, "epochs": epochs, "prompts": dict(sorted(prompts.items()))}
    (folder / SAMPLES_INDEX).write_text(json.dumps(index, indent=1) + "\n")
