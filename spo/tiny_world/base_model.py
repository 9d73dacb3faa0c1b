"""A small Stable Diffusion 1.5, trained from nothing on the tiny world, and its TAESD."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from spo.command_line.config_files import REPO_ROOT
from spo.models.backbone import Backbone
from spo.models.decoder import decode
from spo.models.loading import ModelSource
from spo.scorers.clip import CLIPInputs, load_clip
from spo.tiny_world.clip import TEXT_WIDTH
from spo.tiny_world.fitting import Rounds, fit
from spo.tiny_world.scenes import SIDE, draw_scenes

_LATENT_CHANNELS = 8  # SD1.5's four are too few to tell small shapes at 8 x 8
_WITHOUT_CAPTION = 0.1  # share of training images whose caption is dropped, for guidance
_AT_ONCE = 250  # images that are made for the decoder
_GUIDANCE = 2.0  # as config/tiny.py
_PERCEPTION = 3.0  # weight of the perceptual error against that of pixels


def image_error(images: Tensor, wanted: Tensor) -> Tensor:
    """Returns the mean error () of images (n, 3, H, W) and of their finite differences."""
    error = images - wanted
    # The finite differences keep outlines sharp.
    return error.abs().mean() + sum(error.diff(dim=d).abs().mean() for d in (2, 3))


def train_vae(folder: Path, rounds: Rounds) -> None:
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

    fit("autoencoder", vae, loss, rounds)
    with torch.no_grad():
        _, images = draw_scenes(512, torch.Generator().manual_seed(0))
        spread = vae.encode(images).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    vae.save_pretrained(folder)


@torch.no_grad()
def _encode(vae: AutoencoderKL, inputs: CLIPInputs, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns latents of n images as mean and std (n, C, h, w), scaled, and token ids (n, TOKENS)."""
    parts, scale = [], vae.config.scaling_factor
    for start in range(0, n, 500):
        prompts, images = draw_scenes(500, torch.Generator().manual_seed(start))
        posterior = vae.encode(images).latent_dist
        parts.append((posterior.mean * scale, posterior.std * scale, inputs.tokenize(prompts)))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def train_denoiser(
    folder: Path, vae_folder: Path, clip_folder: Path, rounds: Rounds, num_images: int
) -> None:
    """Trains a UNet and CLIP's text encoder on the VAE's latents, and saves the whole pipeline."""
    inputs = CLIPInputs(str(clip_folder))
    pipe = _new_pipeline(vae_folder, clip_folder, inputs.tokenizer)
    unet, text_encoder, scheduler = pipe.unet, pipe.text_encoder, pipe.scheduler
    mean, std, ids = _encode(pipe.vae, inputs, num_images)
    no_caption = inputs.tokenize([""])

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(mean), (64,), generator=generator)
        latents = mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < _WITHOUT_CAPTION
        text = text_encoder(torch.where(dropped, no_caption, ids[rows]))[0]
        timesteps = torch.randint(1000, (len(rows),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        error = (unet(noisy, timesteps, text).sample - noise).square().mean((1, 2, 3))
        # As a loss on v (arXiv 2202.00512), up to a limit: captions matter at strong noise, where
        # the plain loss on the noise is small.
        return (error * (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=20)).mean()

    networks = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    fit("denoiser", networks, loss, rounds)
    pipe.save_pretrained(folder)


def _new_pipeline(vae: Path, clip: Path, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Returns the VAE, CLIP's text encoder and a UNet with random weights, and SD1.5's scheduler."""
    published = REPO_ROOT / "assets" / "architectures" / "sd15" / "scheduler"
    scheduler = PNDMScheduler.from_pretrained(published, skip_prk_steps=True)
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae),
        text_encoder=CLIPTextModel.from_pretrained(clip, dtype=torch.float32),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
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
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


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


def _features(clip: CLIPModel, pixels: Tensor) -> list[Tensor]:
    vision = clip.vision_model(pixels, output_hidden_states=True)
    return [*vision.hidden_states[1:], clip.visual_projection(vision.pooler_output)]


def train_decoder(
    folder: Path, sd15_folder: Path, clip_folder: Path, rounds: Rounds, num_images: int
) -> None:
    """Distils the decoder of the tiny world's pipeline into an AutoencoderTiny, and saves it.

    The encoder stays random, as nothing uses it. The loss looks at CLIP's features in all layers, too:
    candidates differ by less than the pixels of decoded images err.
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
        features = (_features(clip, prepare(pixels)) for pixels in (decoded, wanted))
        perceptual = sum(
            (ours - theirs).square().mean() / theirs.square().mean()
            for ours, theirs in zip(*features, strict=True)
        )
        return image_error(decoded, wanted) + _PERCEPTION * perceptual

    fit("decoder", tiny.decoder, loss, rounds)
    tiny.save_pretrained(folder)
