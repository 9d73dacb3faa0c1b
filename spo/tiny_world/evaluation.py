"""Compares a base model with a trained LoRA on held-out captions, by measures unseen in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spo.errors import UserError
from spo.evaluation.statistics import Estimate, paired_difference, percent, win_rate
from spo.lora_io.find import find_lora, read_lora
from spo.method.build import Recipe
from spo.models.plain_images import ImageSettings, sample_images
from spo.run.pictures import Cell, grid
from spo.scorers.pixels import to_pil
from spo.tiny_world.quality import hidden_quality, shows_caption
from spo.tiny_world.scenes import SIDE

_BATCH = 50  # images drawn at once
_COLUMNS = 8  # prompts in a row of the picture


@dataclass(frozen=True)
class ScoredImages:
    """The images of one model, in the order of the prompts, with their scores."""

    images: Tensor  # (n, 3, H, W) in [-1, 1]
    quality: Tensor  # (n,) from 0 to 10
    faithful: Tensor  # (n,) 1 if the image shows its prompt, else 0


@dataclass(frozen=True)
class Verdict:
    """A trained model against its base on the same prompts and noise, with 95 % intervals."""

    num_images: int
    quality: dict[str, float]  # means of "base" and "trained", from 0 to 10
    faithful: dict[str, float]  # shares of their images
    difference: Estimate  # of quality, in points
    win_rate: Estimate  # in quality
    faithfulness: Estimate  # difference of the shares of faithful images

    def describe(self, name: str) -> str:
        """Returns the verdict on the model `name` in four lines."""
        base, trained = self.quality.values()
        before, after = (percent(share, digits=1) for share in self.faithful.values())
        low, high = 100 * self.faithfulness.low, 100 * self.faithfulness.high
        return (
            f"quality       base {base:.2f}, {name} {trained:.2f} of 10\n"
            f"difference    {self.difference:+.2f}\n"
            f"win rate      {self.win_rate.percent()} of {self.num_images} held-out prompts\n"
            f"faithful      base {before} %, {name} {after} % "
            f"(difference [{low:+.1f}, {high:+.1f}])"
        )


def compare(base: ScoredImages, trained: ScoredImages) -> Verdict:
    """Returns the verdict on two models' images of the same prompts."""
    models = {"base": base, "trained": trained}
    return Verdict(
        num_images=len(base.images),
        quality={name: model.quality.mean().item() for name, model in models.items()},
        faithful={name: model.faithful.mean().item() for name, model in models.items()},
        difference=paired_difference(base.quality, trained.quality),
        win_rate=win_rate(base.quality, trained.quality),
        faithfulness=paired_difference(base.faithful, trained.faithful),
    )


class Bench:
    """A base model with a LoRA that can be exchanged, and prompts that every model draws."""

    def __init__(self, recipe: Recipe, prompts: Sequence[str]) -> None:
        self.backbone = recipe.load_backbone(torch.device("cpu"))
        side = self.backbone.latent_shape[1] * self.backbone.vae_scale_factor
        if side != SIDE:
            raise UserError(
                f"pretrained.model: the model draws {side} pixels, and is no model of the tiny "
                f"world, whose images have {SIDE}."
            )
        self.lora = recipe.lora.add_to(self.backbone.unet, seed=0)
        self.prompts, drawn = prompts, recipe.validation
        self.settings = ImageSettings(drawn.num_steps, drawn.guidance_scale, drawn.seed)
        with self.lora.using(None):
            self.base = self._draw("base")

    def score(self, run_dir: Path) -> ScoredImages:
        """Returns the images of the LoRA of a run, from the same noise as the base model's."""
        weights = read_lora(find_lora(str(run_dir), "RUN_DIR"), self.lora, "RUN_DIR")
        with self.lora.using(weights):
            return self._draw(run_dir.name)

    def _draw(self, name: str) -> ScoredImages:
        indices = range(len(self.prompts))
        slices = [slice(start, start + _BATCH) for start in indices[::_BATCH]]
        images = [
            sample_images(self.backbone, self.prompts[rows], indices[rows], self.settings)
            for rows in tqdm(slices, desc=name, leave=False)
        ]
        drawn = torch.cat(images).cpu()
        return ScoredImages(drawn, hidden_quality(drawn), shows_caption(drawn, self.prompts))


def before_and_after(
    base: ScoredImages, trained: ScoredImages, prompts: Sequence[str], name: str
) -> Image.Image:
    """Returns a picture of the first prompts: the base's image, and below it the trained model's."""
    rows = []
    for start in (0, _COLUMNS):
        shown = slice(start, start + _COLUMNS)
        asked = [f"  {p.replace('a ', '').removesuffix(' background')}" for p in prompts[shown]]
        for model, words in ((base, asked), (trained, [""] * len(asked))):
            cells = zip(to_pil(model.images[shown]), model.quality[shown], words, strict=True)
            rows.append([Cell(image, f"{quality:.1f}{text}") for image, quality, text in cells])
    title = "Same prompt, same noise; the number is the hidden quality"
    return grid(rows, title, ["base", name] * 2, side=128)
