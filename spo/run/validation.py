"""Validation images: fixed prompts and seeds, drawn again and again while the LoRA changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from spo.models.backbone import Backbone
from spo.models.plain_images import ImageSettings, sample_images
from spo.run.folder import SAMPLES, SAMPLES_INDEX
from spo.run.pictures import Cell, grid
from spo.scorers.pixels import to_pil

_COLUMNS = 4


def draw_cells(
    backbone: Backbone, prompts: Sequence[str], indices: Iterable[int], settings: ImageSettings
) -> list[tuple[int, Cell]]:
    """The images of `prompts` at `indices`, with the UNet as it stands, each with its index.

    One at a time, so that a picture does not depend on what is drawn beside it.
    """
    return [
        (i, Cell(to_pil(sample_images(backbone, [prompts[i]], [i], settings))[0], prompts[i]))
        for i in indices
    ]


def validation_grid(cells: Iterable[tuple[int, Cell]], title: str) -> Image.Image:
    """One picture of cells from any number of processes, in the order of their indices."""
    row = [cell for _, cell in sorted(cells, key=lambda numbered: numbered[0])]
    rows = [row[start : start + _COLUMNS] for start in range(0, len(row), _COLUMNS)]
    return grid(rows, title)


def save_samples(
    run_dir: Path, cells: Iterable[tuple[int, Cell]], weights: str, epochs: int
) -> None:
    """Write the images themselves, those of an earlier epoch replaced, and the prompt of each."""
    folder = run_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    prompts = {}
    for i, cell in cells:
        name = f"{i:02d}.png"
        cell.image.save(folder / name)
        prompts[name] = cell.caption
    index = {"weights": weights, "epochs": epochs, "prompts": dict(sorted(prompts.items()))}
    (folder / SAMPLES_INDEX).write_text(json.dumps(index, indent=1) + "\n")
