"""The tiny world's TAESD: the VAE's decoder, distilled into a smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from spo.method import ddim
from spo.models.backbone import Backbone
from spo.models.decoder import decode
from spo.models.loading import ModelSource
from spo.scorers.clip import CLIPInputs, load_clip
from spo.tiny_world.base_model import draw_images, image_error
from spo.tiny_world.fitting import Fit, fit

_AT_ONCE = 250
_GUIDANCE = 2.0  # that of config/tiny.py
_PERCEPTION = 3.0  # weight against pixels


@dataclass(frozen=True)
class _Examples:
    latents: Tensor  # (n, C, h, w)
    images: Tensor  # (n, 3, SIDE, SIDE), what the VAE makes of them


@torch.no_grad()
def _draw_examples(backbone: Backbone, n: int) -> _Examples:
    """What a rollout decodes: x0 predicted at some t of the world's images with noise on them."""
    schedule, latents, images = backbone.schedule(20), [], []
    for start in range(0, n, _AT_ONCE):
        generator = torch.Generator().manual_seed(start)
        captions, originals = draw_images(_AT_ONCE, generator)
        posterior, noise = torch.randn(2, _AT_ONCE, *backbone.latent_shape, generator=generator)
        timesteps = torch.randint(1000, (_AT_ONCE,), generator=generator)
        clean = backbone.encode_images(originals, posterior)
        abar = schedule.abar(timesteps, clean)
        noisy = ddim.add_noise(clean, noise, abar)
        conditioning = backbone.encode_prompts([str(caption) for caption in captions])
        output = backbone.predict(backbone.unet, noisy, timesteps, conditioning, _GUIDANCE)
        latents.append(ddim.to_x0(schedule, output, noisy, abar))
        images.append(backbone.decode(latents[-1]))
    return _Examples(torch.cat(latents), torch.cat(images))


class _Perception:
    """What a CLIP makes of images, layer by layer: candidates differ by less than pixels err."""

    def __init__(self, folder: Path) -> None:
        self._clip = load_clip(str(folder)).requires_grad_(False).eval()
        self._prepare = CLIPInputs(str(folder)).prepare

    def error(self, images: Tensor, wanted: Tensor) -> Tensor:
        """How far images (n, 3, H, W) are from those that are wanted: a sum over layers, ()."""
        found = self._features(images)
        with torch.no_grad():
            expected = self._features(wanted)
        return sum(
            (one - other).square().mean() / other.square().mean()
            for one, other in zip(found, expected, strict=True)
        )

    def _features(self, images: Tensor) -> list[Tensor]:
        vision = self._clip.vision_model(self._prepare(images), output_hidden_states=True)
        return [*vision.hidden_states[1:], self._clip.visual_projection(vision.pooler_output)]


def train_decoder(
    folder: Path,
    sd15_folder: Path,
    clip_folder: Path,
    rounds: Sequence[Fit],
    state_file: Path,
    num_images: int = 5000,
) -> None:
    """Distil the VAE of the tiny world's pipeline into an AutoencoderTiny, and save that.

    Its encoder, which nothing uses, is left as it was drawn.
    """
    backbone = Backbone(ModelSource(str(sd15_folder)), "sd15", "no", torch.device("cpu"))
    examples, perception = _draw_examples(backbone, num_images), _Perception(clip_folder)
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        latent_channels=backbone.latent_shape[0],
        encoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(20, 20, 20),
        num_decoder_blocks=(3, 2, 0),
    )

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(examples.latents), (16,), generator=generator)
        images, wanted = decode(tiny, examples.latents[rows]), examples.images[rows]
        return image_error(images, wanted) + _PERCEPTION * perception.error(images, wanted)

    fit("decoder", tiny.decoder, loss, rounds, state_file)
    tiny.save_pretrained(folder)
