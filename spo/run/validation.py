"""Validation images: fixed prompts and seeds, drawn again and again while the LoRA changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from spo.atomic import naming, write_json, writing
from spo.command_line.values import Checked, choice, not_negative, number, whole
from spo.data.prompts import read_prompts
from spo.method.ddim import NUM_STEPS
from spo.models.backbone import Backbone
from spo.models.plain_images import ImageSettings, sample_images
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
    seed: int
    num_steps: int = number(NUM_STEPS, lambda v: 1 <= v <= 1000)
    guidance_scale: float = not_negative()
    weights: str = choice("policy", "ema")

    def read_prompts(self) -> tuple[str, ...]:
        """Reads the prompts to draw; raises UserError if there is none."""
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
    options = ImageSettings(settings.num_steps, settings.guidance_scale, settings.seed)
    mine = range(workers.rank, len(prompts), workers.count)
    numbered = []
    with workers.together():
        for i in session.signals.watch(session.bar(mine, "validation images")):
            # One at a time, so that an image does not depend on its batch.
            images = sample_images(backbone, [prompts[i]], [i], options)
            numbered.append((i, Cell(to_pil(images)[0], prompts[i])))
    numbered = workers.gather(numbered, only_to_main=True)
    cells = [cell for _, cell in sorted(numbered, key=itemgetter(0))]

    def show() -> None:
        name = f"validation/epoch_{epochs:04d}_{settings.weights}"
        rows = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
        picture = grid(rows, f"{settings.weights} LoRA after epoch {epochs}")
        session.tracking.picture(name, picture, step)
        with writing(session.run_dir / SAMPLES):
            save_samples(session.run_dir, cells, settings.weights, epochs)

    session.on_main(show)


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
