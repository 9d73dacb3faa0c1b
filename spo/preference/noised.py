"""What the SPM sees of a pair: the base model's predictions of both images from the same noise.

SPO, arXiv 2406.04314. Randomness is an argument: `draw_noise` makes it from one seed per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.method import ddim
from spo.method.ddim import DDIMSchedule
from spo.models.backbone import Backbone
from spo.types import Conditioning


@dataclass(frozen=True)
class PairNoise:
    """What is random about n pairs."""

    timesteps: Tensor  # (n,) one per pair, uniform
    posterior: Tensor  # (n, 2, C, h, w) standard normal: samples each image's latents from the VAE
    noise: Tensor  # (n, C, h, w) standard normal, the same for both images

    def to(self, device: torch.device) -> PairNoise:
        return PairNoise(
            self.timesteps.to(device), self.posterior.to(device), self.noise.to(device)
        )


def draw_noise(
    seeds: Sequence[int], latent_shape: tuple[int, int, int], num_timesteps: int
) -> PairNoise:
    """The randomness of one pair per seed, drawn on the CPU; timesteps in [0, num_timesteps)."""
    timesteps, normals = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        timesteps.append(torch.randint(num_timesteps, (), generator=generator))
        normals.append(torch.randn(3, *latent_shape, generator=generator))
    normal = torch.stack(normals)
    return PairNoise(torch.stack(timesteps), normal[:, :2], normal[:, 2])


@torch.no_grad()
def predicted_images(
    backbone: Backbone,
    schedule: DDIMSchedule,
    images: Tensor,
    conditioning: Conditioning,
    noise: PairNoise,
    guidance_scale: float,
    at_once: int,
) -> Tensor:
    """Images (n, 2, 3, H, W) that the base model predicts from `images` (same shape) at t.

    Nominally in [-1, 1], both. `conditioning` is that of the n prompts. `at_once` images go through
    the VAE and the UNet together.
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
        abar = schedule.abar(timesteps, latents)
        noisy = ddim.add_noise(latents, noise.noise[pairs], abar)
        output = backbone.predict(
            backbone.unet, noisy, timesteps, conditioning.select(pairs), guidance_scale
        )
        parts.append(backbone.decode(ddim.to_x0(schedule, output, noisy, abar)))
    return torch.cat(parts).unflatten(0, (n, 2))
