"""From decoded images and prompts to the SPM's input: predictions of the base model.

SPO, arXiv 2406.04314. Randomness is an argument: `draw_noise` makes it from one seed per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo.command_line.values import Checked, choice, number
from spo.errors import UserError
from spo.method.ddim import NoiseSchedule
from spo.models.backbone import Backbone
from spo.preference.batches import PairBatch
from spo.preference.spm_learner import TrainingPairs
from spo.scorers import Scorer
from spo.scorers.clip import CLIPInputs
from spo.seeding import derive_seed
from spo.types import Conditioning


@dataclass(frozen=True)
class PairNoise:
    """The random numbers of n pairs."""

    timesteps: Tensor  # (n,) one per pair, uniform
    posterior: Tensor  # (n, 2, C, h, w) standard normal; samples each image's latents from the VAE
    noise: Tensor  # (n, C, h, w) standard normal, the same for both images


def draw_noise(
    seeds: Sequence[int],
    latent_shape: tuple[int, int, int],
    num_timesteps: int,
    device: torch.device | str = "cpu",
) -> PairNoise:
    """Draws the random numbers of one pair per seed, on the CPU; timesteps in [0, num_timesteps)."""
    timesteps, normals = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        normals.append(torch.randn(3, *latent_shape, generator=generator))
    normal = torch.stack(normals).to(device)
    return PairNoise(torch.stack(timesteps).to(device), normal[:, :2], normal[:, 2])


@torch.no_grad()
def predicted_images(
    backbone: Backbone,
    schedule: NoiseSchedule,
    images: Tensor,
    conditioning: Conditioning,
    noise: PairNoise,
    guidance_scale: float,
    at_once: int,
) -> Tensor:
    """Returns the images (n, 2, 3, H, W) that the base model predicts from noised `images` at t.

    `images` has the same shape; both are nominally in [-1, 1]. `conditioning` is that of the n
    prompts. At most `at_once` images go through the VAE and the UNet together.
    """
    n = len(images)
    pair_of = torch.arange(n, device=images.device).repeat_interleave(2)
    parts = []
    for rows in torch.arange(2 * n, device=images.device).split(at_once):
        pairs = pair_of[rows]
        latents = backbone.encode_images(
            images.flatten(0, 1)[rows], noise.posterior.flatten(0, 1)[rows]
        )
        timesteps = noise.timesteps[pairs]
        noisy = schedule.add_noise(latents, noise.noise[pairs], timesteps)
        output = backbone.predict(
            backbone.unet, noisy, timesteps, conditioning.select(pairs), guidance_scale
        )
        parts.append(backbone.decode(schedule.predict(output, noisy, timesteps).x0))
    return torch.cat(parts).unflatten(0, (n, 2))


@dataclass(frozen=True)
class LabelSource(Checked, section="labels"):
    """The labels to learn; `config.labels` explains each field."""

    source: str = choice("data", "pickscore")
    margin: float = number("from 0 to below 1", lambda v: 0 <= v < 1)
    backbone: str
    processor: str


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
        self.schedule = backbone.noise_schedule()
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
        return draw_noise(seeds, self.latent_shape, self.num_timesteps, self.backbone.device)

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
