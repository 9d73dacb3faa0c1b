"""Compares a base model with a trained LoRA on held-out captions, by measures unseen in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spo.errors import UserError
from spo.evaluation.statistics import Estimate, paired_difference, win_rate
from spo.lora_io.find import find_lora, read_lora
from spo.models.backbone import Backbone
from spo.models.lora import Lora
from spo.models.plain_images import ImageSettings, sample_images
from spo.run.pictures import Cell, grid
from spo.scorers.pixels import to_pil
from spo.tiny_world.quality import hidden_quality, shows_caption
from spo.tiny_world.scenes import SIDE

_BATCH = 50  # images drawn at once


@dataclass(frozen=True)
class ScoredImages:
    """The images of one model, in the order of the prompts, with their scores."""

    images: Tensor  # (n, 3, H, W) in [-1, 1]
    quality: np.ndarray  # (n,) from 0 to 10
    faithful: np.ndarray  # (n,) bool: the image shows its prompt


@dataclass(frozen=True)
class Verdict:
    """A trained model against its base on the same prompts and noise, with 95 % intervals."""

    base: ScoredImages
    trained: ScoredImages
    difference: Estimate  # of quality, in points
    win_rate: Estimate  # in quality
    faithfulness: Estimate  # difference of the shares of faithful images

    @classmethod
    def of(cls, base: ScoredImages, trained: ScoredImages) -> Verdict:
        """Returns the verdict on two models' images of the same prompts."""
        return cls(
            base,
            trained,
            paired_difference(base.quality, trained.quality),
            win_rate(base.quality, trained.quality),
            paired_difference(base.faithful, trained.faithful),
        )

    def describe(self, name: str) -> str:
        """Returns the verdict on the model `name` in four lines."""
        base, trained, change = self.base, self.trained, self.faithfulness
        quality = f"base {base.quality.mean():.2f}, {name} {trained.quality.mean():.2f} of 10"
        faithful = (
            f"base {100 * base.faithful.mean():.1f} %, {name} {100 * trained.faithful.mean():.1f} % "
            f"(difference [{100 * change.low:+.1f}, {100 * change.high:+.1f}])"
        )
        wins = f"{self.win_rate.percent()} of {len(base.quality)} held-out prompts"
        return (
            f"quality       {quality}\ndifference    {self.difference:+.2f}\n"
            f"win rate      {wins}\nfaithful      {faithful}"
        )

    def as_json(self) -> dict:
        """Returns the verdict for a json file."""
        models = {"base": self.base, "trained": self.trained}
        estimates = ("difference", "win_rate", "faithfulness")
        return {
            "num_images": len(self.base.quality),
            "quality": {name: float(model.quality.mean()) for name, model in models.items()},
            "faithful": {name: float(model.faithful.mean()) for name, model in models.items()},
            **{name: asdict(getattr(self, name)) for name in estimates},
        }


class Bench:
    """A base model with a LoRA that can be exchanged, and prompts that every model draws."""

    def __init__(
        self, backbone: Backbone, lora: Lora, prompts: Sequence[str], settings: ImageSettings
    ) -> None:
        side = backbone.latent_shape[1] * backbone.vae_scale_factor
        if side != SIDE:
            raise UserError(
                f"pretrained.model: the model draws {side} pixels, and is no model of the tiny "
                f"world, whose images have {SIDE}."
            )
        self.backbone, self.lora, self.prompts, self.settings = backbone, lora, prompts, settings
        with lora.using(None):
            self.base = self._draw("base")

    def score(self, run_dir: Path) -> ScoredImages:
        """Returns the images of the LoRA of a run, from the same noise as the base model's."""
        weights = read_lora(find_lora(str(run_dir), "RUN_DIR"), self.lora, "RUN_DIR")
        with self.lora.using(weights):
            return self._draw(run_dir.name)

    def _draw(self, name: str) -> ScoredImages:
        images, indices = [], range(len(self.prompts))
        for start in tqdm(range(0, len(self.prompts), _BATCH), desc=name, leave=False):
            rows = slice(start, start + _BATCH)
            images.append(
                sample_images(self.backbone, self.prompts[rows], indices[rows], self.settings)
            )
        drawn = torch.cat(images).cpu()
        faithful = shows_caption(drawn, self.prompts).bool().numpy()
        return ScoredImages(drawn, hidden_quality(drawn).numpy(), faithful)


def before_and_after(
    verdict: Verdict, prompts: Sequence[str], name: str, columns: int = 8
) -> Image.Image:
    """Returns a picture of the first prompts: the base's image, and below it the trained model's."""
    rows, labels = [], []
    for start in range(0, 2 * columns, columns):
        shown = slice(start, start + columns)
        asked = [f"  {p.replace('a ', '').removesuffix(' background')}" for p in prompts[shown]]
        for label, model in (("base", verdict.base), (name, verdict.trained)):
            words = asked if model is verdict.base else [""] * len(asked)
            cells = zip(to_pil(model.images[shown]), model.quality[shown], words, strict=True)
            rows.append([Cell(image, f"{quality:.1f}{text}") for image, quality, text in cells])
            labels.append(label)
    return grid(rows, "Same prompt, same noise; the number is the hidden quality", labels, side=128)
