"""Validation images: fixed prompts and seeds, drawn again and again while the LoRA changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from spo.atomic import naming, write_json, writing
from spo.command_line.values import Checked, choice, not_negative, number, whole
from spo.data.prompts import read_prompts
from spo.errors import UserError
from spo.method.ddim import NUM_STEPS
from spo.models.backbone import Backbone
from spo.models.plain_images import ImageSettings, sample_latents
from spo.run.folder import SAMPLES, SAMPLES_INDEX
from spo.run.pictures import Cell, grid, write_png
from spo.run.session import Session
from spo.scorers.pixels import to_pil

_COLUMNS = 4


@dataclass(frozen=True)
class ValidationSettings(Checked, section="eval"):
    """The validation images of a training run; `config.eval` explains each."""

    prompts: str
    num_images: int = whole()
    num_judged: int = whole(0)
    seeds_per_prompt: int = whole()
    batch_size: int = whole()
    judges: tuple[str, ...]
    judge_options: Mapping[str, Mapping[str, Any]]
    stop_when_overoptimised: bool
    seed: int
    num_steps: int = number(NUM_STEPS, lambda v: 1 <= v <= 1000)
    guidance_scale: float = not_negative()
    weights: str = choice("policy", "ema")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(isinstance(name, str) for name in self.judges):
            raise UserError("eval.judges: expected only names.")
        if self.stop_when_overoptimised and not self.has_judges:
            raise UserError(
                "eval.stop_when_overoptimised: nobody judges; set eval.judges and eval.num_judged."
            )

    @property
    def has_judges(self) -> bool:
        """True if judges are named, and have prompts to judge."""
        return bool(self.num_judged and self.judges)

    def read_prompts(self) -> tuple[str, ...]:
        """Reads the prompts to draw; raises UserError if there is none."""
        prompts = read_prompts(self.prompts, key="eval.prompts").prompts
        return prompts[: max(self.num_images, self.num_judged)]

    def batches(self, num_prompts: int) -> list[range]:
        """Returns the places of the prompts that are drawn at once: all of them judged, or none."""
        judged = min(self.num_judged, num_prompts)
        size = self.batch_size
        return [
            range(start, min(start + size, end))
            for first, end in ((0, judged), (judged, num_prompts))
            for start in range(first, end, size)
        ]

    def image_settings(self, again: int) -> ImageSettings:
        """Returns the settings of each prompt's first image (`again` is 0), or of a further one."""
        return ImageSettings(self.num_steps, self.guidance_scale, self.seed + again)


@dataclass(frozen=True)
class Drawn:
    """The images of n prompts from one seed."""

    prompts: tuple[str, ...]
    latents: Tensor  # (n, C, h, w)
    images: Tensor  # (n, 3, H, W), nominally in [-1, 1]

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """The n images as PIL's."""
        return to_pil(self.images)


def draw_batch(
    backbone: Backbone, prompts: Sequence[str], places: range, settings: ValidationSettings
) -> list[Drawn]:
    """Draws the prompts at `places` with the UNet's current weights: from each seed a `Drawn`.

    Prompts that are not judged have one. An image depends on its batch by rounding, and on the number
    of processes by nothing.
    """
    own = tuple(prompts[i] for i in places)
    judged = places.start < settings.num_judged
    drawn = []
    for again in range(settings.seeds_per_prompt if judged else 1):
        latents = sample_latents(backbone, own, places, settings.image_settings(again))
        drawn.append(Drawn(own, latents, backbone.decode(latents)))
    return drawn


def show_images(
    session: Session, cells: Sequence[Cell], weights: str, epochs: int, step: int
) -> None:
    """Saves the images as a grid and one by one, and sends the grid to the tracker."""
    rows = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    picture = grid(rows, f"{weights} LoRA after epoch {epochs}")
    session.tracking.picture(file_name(epochs, weights), picture, step)
    with writing(session.run_dir / SAMPLES):
        save_samples(session.run_dir, cells, weights, epochs)


def file_name(epochs: int, weights: str) -> str:
    """Returns the name in the run directory of an epoch's validation images, without suffix."""
    return f"validation/epoch_{epochs:04d}_{weights}"


def save_samples(run_dir: Path, cells: Sequence[Cell], weights: str, epochs: int) -> None:
    """Writes the images one by one with their prompts, in place of an earlier epoch's."""
    folder, prompts = run_dir / SAMPLES, {}
    with naming(folder / SAMPLES_INDEX):
        (folder / SAMPLES_INDEX).unlink(missing_ok=True)  # until all images are of one epoch
    for i, cell in enumerate(cells):
        name = f"{i:02d}.png"
        write_png(folder / name, cell.image)
        prompts[name] = cell.caption
    index = {"weights": weights, "epochs": epochs, "prompts": prompts}
    write_json(folder / SAMPLES_INDEX, index)
