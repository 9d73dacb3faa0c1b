"""From decoded images and prompts to what the SPM takes, by way of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo.command_line.values import require_choice, require_number
from spo.errors import UserError
from spo.models.backbone import Backbone
from spo.preference.batches import PairBatch
from spo.preference.noised import PairNoise, draw_noise, predicted_images
from spo.preference.spm_learner import TrainingPairs
from spo.scorers import CLIPInputs, Scorer
from spo.seeding import derive_seed


@dataclass(frozen=True)
class LabelSource:
    """Whose labels are learnt; `config.labels` explains each field."""

    source: str
    margin: float
    backbone: str
    processor: str

    def __post_init__(self) -> None:
        require_choice("labels.source", self.source, ("data", "pickscore"))
        require_number("labels.margin", self.margin, "from 0 to below 1", lambda v: 0 <= v < 1)

    @property
    def by_pickscore(self) -> bool:
        """True if PickScore labels the pairs (SPO's SDXL model), not people."""
        return self.source == "pickscore"


def labels_of_scores(scores: Tensor, margin: float) -> Tensor:
    """Returns labels (n,) of scores (n, 2): 1 or 0, or 0.5 unless softmax differs by > `margin`."""
    difference = scores.softmax(dim=-1) @ scores.new_tensor([1.0, -1.0])
    return torch.where(difference.abs() > margin, (difference > 0).float(), 0.5)


@dataclass(frozen=True)
class Labeller:
    """A scorer that labels pairs by their clean images."""

    scorer: Scorer
    margin: float

    def labels(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Returns labels (n,) of clean images (n, 2, 3, H, W) in [-1, 1]."""
        features = self.scorer.encode_prompts(captions).repeat_interleave(2, dim=0)
        scores = self.scorer.score(images.flatten(0, 1), features, timestep=0)
        return labels_of_scores(scores.view(-1, 2), self.margin)


class Preparation:
    """The frozen models between the rows and the SPM, on one device.

    Without a `labeller` the labels are those of the data. `at_once`: see `predicted_images`.
    """

    def __init__(
        self,
        backbone: Backbone,
        inputs: CLIPInputs,
        image_size: int,
        guidance_scale: float,
        seed: int,
        at_once: int,
        labeller: Labeller | None = None,
    ) -> None:
        factor = backbone.vae_scale_factor
        if image_size % factor:
            raise UserError(
                f"data.image_size: {image_size} is not a multiple of {factor}, the VAE's factor."
            )
        self.backbone, self.inputs, self.labeller = backbone, inputs, labeller
        self.schedule = backbone.schedule(num_steps=1)
        self.num_timesteps = len(self.schedule.alphas_cumprod)
        self.guidance_scale, self.seed, self.at_once = guidance_scale, seed, at_once
        side = image_size // factor
        self.latent_shape = (backbone.latent_shape[0], side, side)

    def training_pairs(self, batch: PairBatch, total_weight: float) -> TrainingPairs:
        """Returns a minibatch at random timesteps; `total_weight` sums all pairs of the update."""
        noise = self._noise("training", batch)
        return TrainingPairs(
            pixels=self._noised_pixels(batch, noise),
            timesteps=noise.timesteps,
            input_ids=self.input_ids(batch),
            labels=self.labels(batch),
            weights=batch.weights.to(self.backbone.device) / total_weight,
        )

    def validation_pixels(self, batch: PairBatch, timestep: int) -> Tensor:
        """Returns pixels (n, 2, 3, S, S) of a minibatch at `timestep`; at 0 of the clean images."""
        if timestep == 0:
            return self._pixels(self.clean_images(batch))
        noise = self._noise(f"validation/{timestep}", batch)
        timesteps = torch.full_like(noise.timesteps, timestep)
        return self._noised_pixels(batch, replace(noise, timesteps=timesteps))

    def labels(self, batch: PairBatch) -> Tensor:
        """Returns (n,) P(image 0 wins), by the data or by the labeller."""
        if self.labeller is None:
            return batch.labels.to(self.backbone.device)
        return self.labeller.labels(self.clean_images(batch), batch.captions)

    def input_ids(self, batch: PairBatch) -> Tensor:
        """Returns token ids (n, L) of the prompts for the SPM."""
        return self.inputs.tokenize(batch.captions).to(self.backbone.device)

    def clean_images(self, batch: PairBatch) -> Tensor:
        """Returns the images (n, 2, 3, H, W) in [-1, 1]."""
        return batch.images.to(self.backbone.device).float() / 127.5 - 1

    def _noise(self, use: str, batch: PairBatch) -> PairNoise:
        # A seed for each pair: nothing depends on how pairs are shared out over processes.
        seeds = [derive_seed(self.seed, use, place) for place in batch.places]
        noise = draw_noise(seeds, self.latent_shape, self.num_timesteps)
        return noise.to(self.backbone.device)

    def _noised_pixels(self, batch: PairBatch, noise: PairNoise) -> Tensor:
        images = predicted_images(
            self.backbone,
            self.schedule,
            self.clean_images(batch),
            self.backbone.encode_prompts(batch.captions),
            noise,
            self.guidance_scale,
            self.at_once,
        )
        return self._pixels(images)

    def _pixels(self, images: Tensor) -> Tensor:
        return self.inputs.prepare.stretched(images.flatten(0, 1)).unflatten(0, (-1, 2))
