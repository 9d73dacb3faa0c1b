"""Base model against trained LoRA on held-out captions, by measures that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from spo.errors import UserError
from spo.evaluation.statistics import Estimate, paired_difference, win_rate
from spo.lora_io.find import find_lora, read_lora
from spo.method import build
from spo.models.backbone import Backbone
from spo.models.plain_images import ImageSettings, sample_images
from spo.run.pictures import Cell, grid
from spo.scorers.pixels import to_pil
from spo.tiny_world.quality import quality
from spo.tiny_world.reading import read_captions
from spo.tiny_world.scenes import SIDE

_BATCH = 50  # images drawn at once


@dataclass(frozen=True)
class Judged:
    """The images of one model, in the order of the prompts, and what they are worth."""

    images: Tensor  # (n, 3, H, W) in [-1, 1]
    quality: np.ndarray  # (n,) from 0 to 10
    faithful: np.ndarray  # (n,) whether size, colour, shape and background are what was asked for


@dataclass(frozen=True)
class Verdict:
    """A trained model against its base, each with a 95 % interval."""

    difference: Estimate  # of quality, in points
    win_rate: Estimate  # in quality
    faithfulness: Estimate  # difference of the shares of faithful images

    def describe(self, base: Judged, trained: Judged, name: str) -> str:
        """The result in four lines."""
        low, high = 100 * self.faithfulness.low, 100 * self.faithfulness.high
        lines = (
            (
                "quality",
                f"base {base.quality.mean():.2f}, {name} {trained.quality.mean():.2f} of 10",
            ),
            ("difference", f"{self.difference}"),
            ("win rate", f"{self.win_rate.percent()} of {len(base.quality)} held-out prompts"),
            (
                "faithful",
                f"base {100 * base.faithful.mean():.1f} %, {name} "
                f"{100 * trained.faithful.mean():.1f} % (difference [{low:+.1f}, {high:+.1f}])",
            ),
        )
        return "\n".join(f"{label:<13} {text}" for label, text in lines)


class Bench:
    """A base model with a place for a LoRA, and what it makes of the prompts without one."""

    def __init__(
        self, config: ConfigDict, prompts: Sequence[str], image_settings: ImageSettings
    ) -> None:
        self.backbone = Backbone(
            build.model_source(config),
            config.family,
            config.mixed_precision,
            torch.device("cpu"),
        )
        side = self.backbone.latent_shape[1] * self.backbone.vae_scale_factor
        if side != SIDE:
            raise UserError(
                f"pretrained.model: {config.pretrained.model} draws {side} pixels, and is no model of "
                f"the tiny world, whose images have {SIDE}."
            )
        self.prompts, self.image_settings = prompts, image_settings
        self.base = draw_and_judge(self.backbone, prompts, image_settings, "base")
        self._lora = build.build_lora(config, self.backbone.unet, seed=0)

    def judge(self, run_dir: Path) -> Judged:
        """The same prompts from the same noise with the LoRA of a run."""
        weights = read_lora(find_lora(str(run_dir), "RUN_DIR"), self._lora, "RUN_DIR")
        with self._lora.using(weights):
            return draw_and_judge(self.backbone, self.prompts, self.image_settings, run_dir.name)


def draw_and_judge(
    backbone: Backbone, prompts: Sequence[str], image_settings: ImageSettings, name: str
) -> Judged:
    """Draw one image per prompt with the UNet as it stands, and judge them."""
    starts = tqdm(range(0, len(prompts), _BATCH), desc=name, leave=False)
    images = torch.cat(
        [
            sample_images(
                backbone,
                prompts[start : start + _BATCH],
                range(start, min(start + _BATCH, len(prompts))),
                image_settings,
            )
            for start in starts
        ]
    ).cpu()
    shown = [str(caption) for caption in read_captions(images)]
    return Judged(images, quality(images).numpy(), np.array(shown) == np.array(prompts))


def compare(base: Judged, trained: Judged) -> Verdict:
    """The trained model against the base on the same prompts and seeds."""
    return Verdict(
        paired_difference(base.quality, trained.quality),
        win_rate(base.quality, trained.quality),
        paired_difference(base.faithful, trained.faithful),
    )


def summary(base: Judged, trained: Judged, verdict: Verdict) -> dict:
    """The result for a json file."""
    models = {"base": base, "trained": trained}
    return {
        "num_images": len(base.quality),
        "quality": {name: float(model.quality.mean()) for name, model in models.items()},
        "faithful": {name: float(model.faithful.mean()) for name, model in models.items()},
        **asdict(verdict),
    }


def before_and_after(
    prompts: Sequence[str], base: Judged, trained: Judged, name: str, columns: int = 8
) -> Image.Image:
    """The first prompts, each as the base draws it and below as the trained model does."""
    rows, labels = [], []
    for start in range(0, 2 * columns, columns):
        for label, model in (("base", base), (name, trained)):
            pictures = to_pil(model.images[start : start + columns])
            captions = [f"{quality:.1f}" for quality in model.quality[start : start + columns]]
            if model is base:
                asked = (prompt.replace("a ", "") for prompt in prompts[start : start + columns])
                captions = [
                    f"{number}  {prompt.removesuffix(' background')}"
                    for number, prompt in zip(captions, asked, strict=True)
                ]
            rows.append([Cell(p, c) for p, c in zip(pictures, captions, strict=True)])
            labels.append(label)
    return grid(rows, "Same prompt, same noise; the number is the hidden quality", labels, side=128)
