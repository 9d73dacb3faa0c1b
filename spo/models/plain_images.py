"""Plain images: DDIM with eta 0, without branching."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.models.backbone import Backbone
from spo.seeding import derive_seed


@dataclass(frozen=True)
class ImageSettings:
    """Settings of images drawn without branching; `config.eval` explains each."""

    num_steps: int
    guidance_scale: float
    seed: int

    def image_seed(self, index: int) -> int:
        """Returns the seed of the noise that image `index` starts from."""
        return derive_seed(self.seed, "image", index)


def sample_images(
    backbone: Backbone, prompts: Sequence[str], indices: Sequence[int], settings: ImageSettings
) -> Tensor:
    """Returns images (n, 3, H, W) of n prompts with the UNet's current weights.

    Image i starts from noise seeded with settings.image_seed(indices[i]), whatever the batch.
    """
    return backbone.decode(sample_latents(backbone, prompts, indices, settings))


@torch.no_grad()
def sample_latents(
    backbone: Backbone, prompts: Sequence[str], indices: Sequence[int], settings: ImageSettings
) -> Tensor:
    """Returns the latents (n, C, h, w) of the same images."""
    sampler = backbone.sampler(settings.num_steps, eta=0.0)
    conditioning = backbone.encode_prompts(prompts)
    noises = []
    for index in indices:
        generator = torch.Generator().manual_seed(settings.image_seed(index))
        noises.append(torch.randn(backbone.latent_shape, generator=generator))
    latents = torch.stack(noises).to(backbone.device)
    no_noise = torch.zeros((), device=latents.device)
    for timestep in sampler.timesteps:
        output = backbone.predict(
            backbone.unet, latents, timestep, conditioning, settings.guidance_scale
        )
        prediction = sampler.predict(output, latents, timestep)
        latents = sampler.step(prediction, timestep, no_noise)
    return latents
