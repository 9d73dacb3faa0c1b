"""A small Stable Diffusion 1.5, trained from nothing on the tiny world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from spo.tiny_world.clip import TEXT_WIDTH, token_ids
from spo.tiny_world.fitting import Fit, fit
from spo.tiny_world.scenes import SIDE, draw_scenes

_LATENT_CHANNELS = 8  # SD1.5's four are too few to tell small shapes at 8 x 8
_WITHOUT_CAPTION = 0.1  # share of training images whose caption is dropped, for guidance


def image_error(images: Tensor, wanted: Tensor) -> Tensor:
    """Returns the mean error () of images (n, 3, H, W) and of their finite differences."""
    error = images - wanted
    # The finite differences keep outlines sharp.
    return error.abs().mean() + sum(error.diff(dim=d).abs().mean() for d in (2, 3))


def train_vae(folder: Path, rounds: Sequence[Fit], state_file: Path) -> None:
    """Trains an autoencoder of factor 4 and saves it, its latents scaled to unit variance."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
    )

    def loss(generator: torch.Generator) -> Tensor:
        _, images = draw_scenes(64, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        return image_error(decoded, images) + 1e-5 * posterior.kl().float().mean() / 256

    fit("autoencoder", vae, loss, rounds, state_file)
    with torch.no_grad():
        _, images = draw_scenes(512, torch.Generator().manual_seed(0))
        spread = vae.encode(images).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(folder)


class _Network(nn.Module):
    """The UNet and the text encoder, which are trained together."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = UNet2DConditionModel(
            sample_size=SIDE // 4,
            in_channels=_LATENT_CHANNELS,
            out_channels=_LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=(64, 96),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,  # diffusers means the number of heads
            norm_num_groups=16,
        )


@dataclass(frozen=True)
class _Latents:
    """Encoded training images and their captions."""

    mean: Tensor  # (n, C, h, w), scaled
    std: Tensor  # (n, C, h, w)
    ids: Tensor  # (n, TOKENS) of the captions
    no_caption: Tensor  # (1, TOKENS) of the empty caption


@torch.no_grad()
def _encode(vae: AutoencoderKL, tokenizer: CLIPTokenizer, n: int) -> _Latents:
    means, stds, ids = [], [], []
    for start in range(0, n, 500):
        prompts, images = draw_scenes(500, torch.Generator().manual_seed(start))
        posterior = vae.encode(images).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        stds.append(posterior.std * vae.config.scaling_factor)
        ids.append(token_ids(tokenizer, prompts))
    no_caption = token_ids(tokenizer, [""])
    return _Latents(torch.cat(means), torch.cat(stds), torch.cat(ids), no_caption)


def _denoising_loss(
    network: _Network, data: _Latents, scheduler: PNDMScheduler, generator: torch.Generator
) -> Tensor:
    rows = torch.randint(len(data.mean), (64,), generator=generator)
    latents = data.mean[rows]
    latents = latents + data.std[rows] * torch.randn(latents.shape, generator=generator)
    dropped = torch.rand(len(rows), 1, generator=generator) < _WITHOUT_CAPTION
    text = network.text_encoder(torch.where(dropped, data.no_caption, data.ids[rows]))[0]
    timesteps = torch.randint(1000, (len(rows),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    error = (network.unet(noisy, timesteps, text).sample - noise).square().mean((1, 2, 3))
    # As a loss on v (arXiv 2202.00512), up to a limit: captions matter at strong noise, where the
    # plain loss on the noise is small.
    return (error * (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=20)).mean()


def train_denoiser(
    folder: Path,
    vae_folder: Path,
    clip_folder: Path,
    rounds: Sequence[Fit],
    state_file: Path,
    num_images: int,
) -> None:
    """Trains a UNet and CLIP's text encoder on the VAE's latents, and saves the whole pipeline."""
    vae = AutoencoderKL.from_pretrained(vae_folder)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    scheduler = PNDMScheduler(  # SD1.5's
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        skip_prk_steps=True,
    )
    scheduler.register_to_config(clip_sample=False)  # else schedulers made from this one clip
    data = _encode(vae, tokenizer, num_images)
    torch.manual_seed(0)
    network = _Network(CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32))

    def loss(generator: torch.Generator) -> Tensor:
        return _denoising_loss(network, data, scheduler, generator)

    fit("denoiser", network, loss, rounds, state_file)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=network.text_encoder,
        tokenizer=tokenizer,
        unet=network.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
