"""From decoded images and prompts to what the SPM takes, by way of the base model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo.errors import UserError
from spo.models.backbone import Backbone
from spo.preference.batches import PairBatch
from spo.preference.labels import relabel
from spo.preference.noised import PairNoise, draw_noise, predicted_images
from spo.preference.spm_learner import TrainingPairs
from spo.scorers import Scorer
from spo.scorers.clip import CLIPInputs
from spo.seeding import derive_seed


@dataclass(frozen=True)
class Labeller:
    """A scorer that labels pairs by their clean images."""

    scorer: Scorer
    margin: float


class Preparation:
    """The models that stand between the rows and the SPM, on one device; None of them is trained.

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
        """A minibatch at random timesteps; `total_weight` is that of all pairs of the update."""
        noise = self._noise("training", batch)
        return TrainingPairs(
            pixels=self._noised_pixels(batch, noise),
            timesteps=noise.timesteps,
            input_ids=self.input_ids(batch),
            labels=self.labels(batch),
            weights=batch.weights.to(self.backbone.device) / total_weight,
        )

    def validation_pixels(self, batch: PairBatch, timestep: int) -> Tensor:
        """Pixels (n, 2, 3, S, S) of a minibatch at `timestep`; at 0 those of the clean images."""
        if timestep == 0:
            return self._pixels(self.clean_images(batch))
        noise = self._noise(f"validation/{timestep}", batch)
        timesteps = torch.full_like(noise.timesteps, timestep)
        return self._noised_pixels(batch, replace(noise, timesteps=timesteps))

    def labels(self, batch: PairBatch) -> Tensor:
        """(n,) P(image 0 wins), by the data or by the labeller."""
        if self.labeller is None:
            return batch.labels.to(self.backbone.device)
        captions, margin = list(batch.captions), self.labeller.margin
        return relabel(self.labeller.scorer, self.clean_images(batch), captions, margin)

    def input_ids(self, batch: PairBatch) -> Tensor:
        """Token ids (n, L) of the prompts for the SPM."""
        return self.inputs.tokenize(batch.captions).to(self.backbone.device)

    def clean_images(self, batch: PairBatch) -> Tensor:
        """(n, 2, 3, H, W) in [-1, 1]."""
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
