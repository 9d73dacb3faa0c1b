"""A Stable Diffusion 1.5 in small, trained from nothing on the tiny world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from spo.tiny_world.fitting import Fit, fit
from spo.tiny_world.scenes import SIDE, Caption, Making, all_captions, render

TOKENS = 16  # length that prompts are padded to; a caption has ten tokens
_CROSS_ATTENTION = 64
_LATENT_CHANNELS = 8  # four, as in SD1.5, are too few to tell small shapes at 8 x 8
_WITHOUT_CAPTION = 0.1  # share of training images whose caption is dropped, for guidance
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def draw_images(n: int, generator: torch.Generator) -> tuple[list[Caption], Tensor]:
    """n captions drawn uniformly, and an image (n, 3, SIDE, SIDE) of each."""
    captions = all_captions()
    drawn = [captions[i] for i in torch.randint(len(captions), (n,), generator=generator)]
    return drawn, render(drawn, Making.draw(n, generator), generator)


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with a vocabulary of single letters and the world's own words."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in sorted({word for caption in all_captions() for word in str(caption).split()}):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            parts = [parts[0] + parts[1], *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(parts[0])
    vocabulary += [_BOS, _EOS]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    vocab_file.write_text(json.dumps(ids, ensure_ascii=False))
    merges_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(vocab_file), merges=str(merges_file), model_max_length=TOKENS
    )
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (n, TOKENS)."""
    return tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")[
        "input_ids"
    ]


def text_config(tokenizer: CLIPTokenizer, **options) -> CLIPTextConfig:
    """A small CLIP text tower for `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_CROSS_ATTENTION,
        intermediate_size=2 * _CROSS_ATTENTION,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def image_error(images: Tensor, wanted: Tensor) -> Tensor:
    """How far images (n, 3, H, W) are from those that are wanted: a mean, ()."""
    error = images - wanted
    # Errors of the finite differences keep outlines sharp.
    return error.abs().mean() + sum(error.diff(dim=d).abs().mean() for d in (2, 3))


def train_vae(folder: Path, rounds: Sequence[Fit], state_file: Path) -> None:
    """Train an autoencoder of factor 4 and save it, its latents scaled to unit variance."""
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
        _, images = draw_images(64, generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        return image_error(decoded, images) + 1e-5 * posterior.kl().float().mean() / 256

    fit("autoencoder", vae, loss, rounds, state_file)
    with torch.no_grad():
        _, images = draw_images(512, torch.Generator().manual_seed(0))
        spread = vae.encode(images).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(folder)


class _Denoiser(nn.Module):
    """UNet and text encoder, which are trained together."""

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
            cross_attention_dim=_CROSS_ATTENTION,
            attention_head_dim=2,  # diffusers means the number of heads
            norm_num_groups=16,
        )


@dataclass(frozen=True)
class _Latents:
    """Encoded training images."""

    mean: Tensor  # (n, 4, h, w), scaled
    std: Tensor  # (n, 4, h, w)
    ids: Tensor  # (n, TOKENS) of their captions


@torch.no_grad()
def _encode(vae: AutoencoderKL, tokenizer: CLIPTokenizer, n: int) -> _Latents:
    means, stds, ids = [], [], []
    for start in range(0, n, 500):
        captions, images = draw_images(500, torch.Generator().manual_seed(start))
        posterior = vae.encode(images).latent_dist
        means.append(posterior.mean * vae.config.scaling_factor)
        stds.append(posterior.std * vae.config.scaling_factor)
        ids.append(token_ids(tokenizer, [str(caption) for caption in captions]))
    return _Latents(torch.cat(means), torch.cat(stds), torch.cat(ids))


def train_denoiser(
    folder: Path,
    vae_folder: Path,
    clip_folder: Path,
    rounds: Sequence[Fit],
    state_file: Path,
    num_images: int = 40_000,
) -> None:
    """Train a UNet, and CLIP's text encoder further, on the VAE's latents; save the pipeline."""
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
    scheduler.register_to_config(clip_sample=False)  # or other schedulers made from this one clip
    data = _encode(vae, tokenizer, num_images)
    no_caption = token_ids(tokenizer, [""])
    torch.manual_seed(0)
    network = _Denoiser(CLIPTextModel.from_pretrained(clip_folder, dtype=torch.float32))

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.mean), (64,), generator=generator)
        latents = data.mean[rows]
        latents = latents + data.std[rows] * torch.randn(latents.shape, generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < _WITHOUT_CAPTION
        text = network.text_encoder(torch.where(dropped, no_caption, data.ids[rows]))[0]
        timesteps = torch.randint(1000, (len(rows),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        error = (network.unet(noisy, timesteps, text).sample - noise).square().mean((1, 2, 3))
        # As a loss on v (arXiv 2202.00512), up to a limit: captions matter where noise is strong,
        # and there the plain loss on the noise is small.
        return (error * (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=20)).mean()

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
