"""Plain sampling of images: DDIM without branching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.method import ddim
from spo.models.backbone import Backbone
from spo.seeding import derive_seed


@dataclass(frozen=True)
class ImageSettings:
    """How images are drawn; `config.eval` explains each."""

    num_steps: int
    guidance_scale: float
    seed: int

    def image_seed(self, index: int) -> int:
        """The seed of the noise that image `index` starts from."""
        return derive_seed(self.seed, "image", index)


@torch.no_grad()
def sample_images(
    backbone: Backbone, prompts: Sequence[str], indices: Sequence[int], settings: ImageSettings
) -> Tensor:
    """Images (n, 3, H, W) of n prompts with the UNet as it stands, by DDIM with eta 0.

    Image i starts from noise seeded with settings.image_seed(indices[i]), whatever the batch.
    """
    schedule = backbone.schedule(settings.num_steps)
    conditioning = backbone.encode_prompts(prompts)
    noises = []
    for index in indices:
        generator = torch.Generator().manual_seed(settings.image_seed(index))
        noises.append(torch.randn(backbone.latent_shape, generator=generator))
    latents = torch.stack(noises).to(backbone.device)
    for timestep in schedule.timesteps:
        output = backbone.predict(
            backbone.unet, latents, timestep, conditioning, settings.guidance_scale
        )
        abar = schedule.abar(timestep, latents)
        latents = ddim.transition_mean(
            ddim.to_x0(schedule, output, latents, abar),
            ddim.to_epsilon(schedule, output, latents, abar),
            schedule.abar_previous(timestep, latents),
            sigma=torch.zeros((), device=latents.device),
        )
    return backbone.decode(latents)
