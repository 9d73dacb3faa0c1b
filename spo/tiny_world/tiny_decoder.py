"""The tiny world's TAESD: the VAE's decoder, distilled into a smaller one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPModel

from spo.models.backbone import Backbone
from spo.models.decoder import decode
from spo.models.loading import ModelSource
from spo.scorers.clip import CLIPInputs, load_clip
from spo.tiny_world.base_model import image_error
from spo.tiny_world.fitting import Fit, fit
from spo.tiny_world.scenes import draw_scenes

_AT_ONCE = 250  # images
_GUIDANCE = 2.0  # as config/tiny.py
_PERCEPTION = 3.0  # weight of the perceptual error against that of pixels


@torch.no_grad()
def _draw_examples(backbone: Backbone, n: int) -> tuple[Tensor, Tensor]:
    """Returns latents (n, C, h, w) such as rollouts decode, and the VAE's images (n, 3, SIDE, SIDE).

    The latents are the model's x0 for the world's images with noise at a random timestep.
    """
    schedule, latents, images = backbone.noise_schedule(), [], []
    for start in range(0, n, _AT_ONCE):
        generator = torch.Generator().manual_seed(start)
        prompts, originals = draw_scenes(_AT_ONCE, generator)
        posterior, noise = torch.randn(2, _AT_ONCE, *backbone.latent_shape, generator=generator)
        timesteps = torch.randint(1000, (_AT_ONCE,), generator=generator)
        clean = backbone.encode_images(originals, posterior)
        noisy = schedule.add_noise(clean, noise, timesteps)
        conditioning = backbone.encode_prompts(prompts)
        output = backbone.predict(backbone.unet, noisy, timesteps, conditioning, _GUIDANCE)
        latents.append(schedule.predict(output, noisy, timesteps).x0)
        images.append(backbone.decode(latents[-1]))
    return torch.cat(latents), torch.cat(images)


def _perceptual_error(clip: CLIPModel, pixels: Tensor, wanted: Tensor) -> Tensor:
    """Returns the error () of normalised pixels (n, 3, S, S) in a CLIP's features, over all layers.

    Candidates differ by less than the pixels of decoded images err.
    """
    with torch.no_grad():
        expected = _features(clip, wanted)
    return sum(
        (one - other).square().mean() / other.square().mean()
        for one, other in zip(_features(clip, pixels), expected, strict=True)
    )


def _features(clip: CLIPModel, pixels: Tensor) -> list[Tensor]:
    vision = clip.vision_model(pixels, output_hidden_states=True)
    return [*vision.hidden_states[1:], clip.visual_projection(vision.pooler_output)]


def train_decoder(
    folder: Path,
    sd15_folder: Path,
    clip_folder: Path,
    rounds: Sequence[Fit],
    state_file: Path,
    num_images: int,
) -> None:
    """Distils the decoder of the tiny world's pipeline into an AutoencoderTiny, and saves it.

    The encoder stays random, as nothing uses it.
    """
    backbone = Backbone(ModelSource(str(sd15_folder)), "sd15", "no", torch.device("cpu"))
    latents, images = _draw_examples(backbone, num_images)
    clip = load_clip(str(clip_folder)).requires_grad_(False).eval()
    prepare = CLIPInputs(str(clip_folder)).prepare
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        latent_channels=backbone.latent_shape[0],
        encoder_block_out_channels=(4, 4, 4),
        num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(20, 20, 20),
        num_decoder_blocks=(3, 2, 0),
    )

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (16,), generator=generator)
        decoded, wanted = decode(tiny, latents[rows]), images[rows]
        perceptual = _perceptual_error(clip, prepare(decoded), prepare(wanted))
        return image_error(decoded, wanted) + _PERCEPTION * perceptual

    fit("decoder", tiny.decoder, loss, rounds, state_file)
    tiny.save_pretrained(folder)
