"""What the SPM sees of a pair: the base model's predictions of both images from the same noise.

SPO, arXiv 2406.04314. Randomness is an argument: `draw_noise` makes it from one seed per pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo import ddim
from spo.backbone import Backbone
from spo.ddim import DDIMSchedule
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
) -> Tensor:
    """Images (n, 2, 3, H, W) that the base model predicts from `images` (same shape) at t.

    Nominally in [-1, 1], both. `conditioning` is that of the n prompts.
    """
    n = len(images)
    latents = backbone.encode_images(images.flatten(0, 1), noise.posterior.flatten(0, 1))
    rows = torch.arange(n, device=latents.device).repeat_interleave(2)
    timesteps = noise.timesteps[rows]
    abar = schedule.abar(timesteps, latents)
    noisy = ddim.add_noise(latents, noise.noise[rows], abar)
    output = backbone.predict(
        backbone.unet, noisy, timesteps, conditioning.select(rows), guidance_scale
    )
    x0 = ddim.to_x0(schedule, output, noisy, abar)
    return backbone.decode(x0).unflatten(0, (n, 2))
