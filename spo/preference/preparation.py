"""From decoded images and prompts to what a preference model sees. Every pair has a seed of its own.

The SPM sees the base model's predictions from the noised images (SPO, arXiv 2406.04314); lrm.py has the
input of the LRM.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from spo.command_line.values import Checked, choice, number
from spo.errors import UserError
from spo.models.backbone import Backbone
from spo.preference.batches import PairBatch
from spo.preference.pair_learner import TrainingPairs
from spo.scorers import Scorer
from spo.scorers.clip import CLIPInputs
from spo.seeding import derive_seed


@dataclass(frozen=True)
class PairNoise:
    """The random numbers of n pairs."""

    timesteps: Tensor  # (n,) one per pair, uniform
    posterior: Tensor  # (n, 2, C, h, w) standard normal; samples each image's latents from the VAE
    noise: Tensor  # (n, 2, C, h, w) standard normal; an SPM's is the same for both images


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
class Preparation(ABC):
    """The frozen models between the rows and a preference model, on one device.

    A `labeller` labels pairs by their clean images, with ties up to `margin`; without one the labels
    are those of the data. At most `at_once` images go through the VAE and the UNet together.
    """

    backbone: Backbone
    image_size: int
    num_timesteps: int
    seed: int
    at_once: int
    labeller: Scorer | None = None
    margin: float = 0.0

    shares_noise: ClassVar[bool]  # between the images of a pair
    validation_timesteps: ClassVar[tuple[int, ...]]

    def __post_init__(self) -> None:
        side, rest = divmod(self.image_size, self.backbone.vae_scale_factor)
        if rest:
            reason = f"is not a multiple of {self.backbone.vae_scale_factor}, the VAE's factor."
            raise UserError(f"data.image_size: {self.image_size} {reason}")
        self.schedule = self.backbone.noise_schedule()
        self.latent_shape = (self.backbone.latent_shape[0], side, side)
        self.timesteps = torch.arange(len(self.schedule.alphas_cumprod))
        if self.num_timesteps < len(self.timesteps):
            sampler = self.backbone.sampler(self.num_timesteps, 1.0, "leading")
            self.timesteps = torch.tensor(sampler.timesteps[::-1])

    @abstractmethod
    def noised(self, batch: PairBatch, noise: PairNoise) -> Tensor:
        """Returns what the model sees (n, 2, ...) of a minibatch noised to each pair's timestep."""

    @abstractmethod
    def validation_images(self, batch: PairBatch) -> Iterator[tuple[int, Tensor]]:
        """Yields `validation_timesteps`, with what the model sees (n, 2, ...), always the same."""

    @abstractmethod
    def input_ids(self, batch: PairBatch) -> tuple[Tensor, ...]:
        """Returns token ids (n, L) of the prompts, for each text encoder of the model."""

    def training_pairs(self, batch: PairBatch, total_weight: float) -> TrainingPairs:
        """Returns a minibatch at random timesteps; `total_weight` sums all pairs of the update."""
        noise = self.draw_noise("training", batch.places)
        return TrainingPairs(
            images=self.noised(batch, noise),
            timesteps=noise.timesteps,
            input_ids=self.input_ids(batch),
            labels=self.labels(batch),
            weights=batch.weights.to(self.backbone.device) / total_weight,
        )

    def labels(self, batch: PairBatch) -> Tensor:
        """Returns (n,) P(image 0 wins), by the data or by the labeller."""
        if self.labeller is None:
            return batch.labels.to(self.backbone.device)
        features = self.labeller.encode_prompts(batch.captions).repeat_interleave(2, dim=0)
        images = self.clean_images(batch).flatten(0, 1)
        scores = self.labeller.score(images, features, timestep=0)
        return labels_of_scores(scores.view(-1, 2), self.margin)

    def clean_images(self, batch: PairBatch) -> Tensor:
        """Returns the images (n, 2, 3, H, W) in [-1, 1]."""
        return batch.images.to(self.backbone.device).float() / 127.5 - 1

    def draw_noise(self, use: str, places: Sequence[int]) -> PairNoise:
        """Draws random numbers on the CPU, by a seed per pair: processes may share pairs anyhow."""
        timesteps, normals, count = [], [], 3 if self.shares_noise else 4
        for place in places:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, use, place))
            index = torch.randint(len(self.timesteps), (), generator=generator)
            timesteps.append(self.timesteps[index])
            normals.append(torch.randn(count, *self.latent_shape, generator=generator))
        normal = torch.stack(normals).to(self.backbone.device)
        timesteps = torch.stack(timesteps).to(self.backbone.device)
        posterior, noise = normal[:, :2], normal[:, 2:]
        return PairNoise(timesteps, posterior, noise.expand_as(posterior))

    @torch.no_grad()
    def latents(self, images: Tensor, posterior: Tensor) -> Tensor:
        """Returns latents (n, 2, C, h, w) of images (n, 2, 3, H, W), by PairNoise's `posterior`."""
        parts = (values.flatten(0, 1).split(self.at_once) for values in (images, posterior))
        found = [self.backbone.encode_images(*part) for part in zip(*parts, strict=True)]
        return torch.cat(found).unflatten(0, (-1, 2))

    def noisy_latents(self, images: Tensor, noise: PairNoise) -> Tensor:
        """Returns latents (n, 2, C, h, w) of images (n, 2, 3, H, W), noised to each pair's timestep."""
        latents = self.latents(images, noise.posterior)
        return self.schedule.add_noise(latents, noise.noise, noise.timesteps)


@dataclass(kw_only=True)
class SPMPreparation(Preparation):
    """Prepares the pixels of the images that the base model predicts from the noised ones."""

    inputs: CLIPInputs
    guidance_scale: float

    shares_noise = True
    validation_timesteps = (0, 251, 501, 701, 951)  # 0: the clean images themselves

    def noised(self, batch: PairBatch, noise: PairNoise) -> Tensor:
        """Returns pixels (n, 2, 3, S, S)."""
        return self._pixels(self.predicted_images(self.clean_images(batch), batch.captions, noise))

    def validation_images(self, batch: PairBatch) -> Iterator[tuple[int, Tensor]]:
        """Yields timesteps and pixels (n, 2, 3, S, S)."""
        yield 0, self._pixels(self.clean_images(batch))
        for timestep in self.validation_timesteps[1:]:
            noise = self.draw_noise(f"validation/{timestep}", batch.places)
            timesteps = torch.full_like(noise.timesteps, timestep)
            yield timestep, self.noised(batch, replace(noise, timesteps=timesteps))

    def input_ids(self, batch: PairBatch) -> tuple[Tensor]:
        """Returns token ids (n, L) of the prompts."""
        return (self.inputs.tokenize(batch.captions).to(self.backbone.device),)

    @torch.no_grad()
    def predicted_images(self, images: Tensor, captions: Sequence[str], noise: PairNoise) -> Tensor:
        """Returns images (n, 2, 3, H, W), about in [-1, 1], predicted from `images` noised to t."""
        base, conditioning, found = self.backbone, self.backbone.encode_prompts(captions), []
        latents = self.noisy_latents(images, noise).flatten(0, 1)
        for rows in torch.arange(len(latents), device=latents.device).split(self.at_once):
            noisy, timesteps = latents[rows], noise.timesteps[rows // 2]
            text = conditioning.select(rows // 2)
            output = base.predict(base.unet, noisy, timesteps, text, self.guidance_scale)
            found.append(base.decode(self.schedule.predict(output, noisy, timesteps).x0))
        return torch.cat(found).unflatten(0, (-1, 2))

    def _pixels(self, images: Tensor) -> Tensor:
        return self.inputs.prepare.stretched(images.flatten(0, 1)).unflatten(0, (-1, 2))
