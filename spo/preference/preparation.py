"""From decoded images and prompts to the SPM's input: predictions of the base model.

SPO, arXiv 2406.04314. Every pair has a seed of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo.command_line.values import Checked, choice, number
from spo.errors import UserError
from spo.models.backbone import Backbone
from spo.preference.batches import PairBatch
from spo.preference.spm_learner import TrainingPairs
from spo.scorers import Scorer
from spo.scorers.clip import CLIPInputs
from spo.seeding import derive_seed


@dataclass(frozen=True)
class PairNoise:
    """The random numbers of n pairs."""

    timesteps: Tensor  # (n,) one per pair, uniform
    posterior: Tensor  # (n, 2, C, h, w) standard normal; samples each image's latents from the VAE
    noise: Tensor  # (n, C, h, w) standard normal, the same for both images


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


@dataclass
class Preparation:
    """The frozen models between the rows and the SPM, on one device.

    A `labeller` labels pairs by their clean images, with ties up to `margin`; without one the labels
    are those of the data. At most `at_once` images go through the VAE and the UNet together.
    """

    backbone: Backbone
    inputs: CLIPInputs
    image_size: int
    guidance_scale: float
    seed: int
    at_once: int
    labeller: Scorer | None = None
    margin: float = 0.0

    def __post_init__(self) -> None:
        side, rest = divmod(self.image_size, self.backbone.vae_scale_factor)
        if rest:
            reason = f"is not a multiple of {self.backbone.vae_scale_factor}, the VAE's factor."
            raise UserError(f"data.image_size: {self.image_size} {reason}")
        self.schedule = self.backbone.noise_schedule()
        self.latent_shape = (self.backbone.latent_shape[0], side, side)

    def training_pairs(self, batch: PairBatch, total_weight: float) -> TrainingPairs:
        """Returns a minibatch at random timesteps; `total_weight` sums all pairs of the update."""
        noise = self.draw_noise("training", batch.places)
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
        noise = self.draw_noise(f"validation/{timestep}", batch.places)
        timesteps = torch.full_like(noise.timesteps, timestep)
        return self._noised_pixels(batch, replace(noise, timesteps=timesteps))

    def labels(self, batch: PairBatch) -> Tensor:
        """Returns (n,) P(image 0 wins), by the data or by the labeller."""
        if self.labeller is None:
            return batch.labels.to(self.backbone.device)
        features = self.labeller.encode_prompts(batch.captions).repeat_interleave(2, dim=0)
        images = self.clean_images(batch).flatten(0, 1)
        scores = self.labeller.score(images, features, timestep=0)
        return labels_of_scores(scores.view(-1, 2), self.margin)

    def input_ids(self, batch: PairBatch) -> Tensor:
        """Returns token ids (n, L) of the prompts for the SPM."""
        return self.inputs.tokenize(batch.captions).to(self.backbone.device)

    def clean_images(self, batch: PairBatch) -> Tensor:
        """Returns the images (n, 2, 3, H, W) in [-1, 1]."""
        return batch.images.to(self.backbone.device).float() / 127.5 - 1

    def draw_noise(self, use: str, places: Sequence[int]) -> PairNoise:
        """Draws random numbers on the CPU, by a seed per pair: processes may share pairs anyhow."""
        timesteps, normals, total = [], [], len(self.schedule.alphas_cumprod)
        for place in places:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, use, place))
            timesteps.append(torch.randint(total, (), generator=generator))
            normals.append(torch.randn(3, *self.latent_shape, generator=generator))
        normal = torch.stack(normals).to(self.backbone.device)
        timesteps = torch.stack(timesteps).to(self.backbone.device)
        return PairNoise(timesteps, normal[:, :2], normal[:, 2])

    @torch.no_grad()
    def predicted_images(self, images: Tensor, captions: Sequence[str], noise: PairNoise) -> Tensor:
        """Returns images (n, 2, 3, H, W), about in [-1, 1], predicted from `images` noised to t."""
        n, base = len(images), self.backbone
        pair_of = torch.arange(n, device=images.device).repeat_interleave(2)
        conditioning, parts = base.encode_prompts(captions), []
        for rows in torch.arange(2 * n, device=images.device).split(self.at_once):
            pairs = pair_of[rows]
            posterior = noise.posterior.flatten(0, 1)[rows]
            latents = base.encode_images(images.flatten(0, 1)[rows], posterior)
            timesteps, text = noise.timesteps[pairs], conditioning.select(pairs)
            noisy = self.schedule.add_noise(latents, noise.noise[pairs], timesteps)
            output = base.predict(base.unet, noisy, timesteps, text, self.guidance_scale)
            parts.append(base.decode(self.schedule.predict(output, noisy, timesteps).x0))
        return torch.cat(parts).unflatten(0, (n, 2))

    def _noised_pixels(self, batch: PairBatch, noise: PairNoise) -> Tensor:
        return self._pixels(self.predicted_images(self.clean_images(batch), batch.captions, noise))

    def _pixels(self, images: Tensor) -> Tensor:
        return self.inputs.prepare.stretched(images.flatten(0, 1)).unflatten(0, (-1, 2))
