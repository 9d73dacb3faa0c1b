"""SD1.5 or SDXL behind one interface: encode prompts and images, guided prediction, decode.

The only file, besides families.py, that depends on the family of a model.
"""

import contextlib
import logging
from collections.abc import Sequence

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spo.data.token_lengths import readable
from spo.method.ddim import DDIM, MODEL, NoiseSchedule, make_sampler, noise_schedule
from spo.models.decoder import decode, load_decoder, normalisation
from spo.models.loading import ModelSource, load_pipeline
from spo.types import Conditioning

# A LoRA that leaves the text encoders alone is no reason for a warning.
logging.getLogger("diffusers.loaders.lora_base").addFilter(
    lambda record: "No LoRA keys associated to" not in record.getMessage()
)

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
}
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Backbone:
    """A frozen base model on one device: the only copy of its weights in the process."""

    def __init__(
        self, source: ModelSource, family: str, mixed_precision: str, device: torch.device
    ) -> None:
        self.family = family
        self.device = device
        self.dtype = DTYPES[mixed_precision]
        self._pipe = self._load(source).to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self.unet = self._pipe.unet
        self.vae = self._pipe.vae
        self.decoder = self.vae  # of a rollout's candidates
        if source.decoder is not None:
            self.decoder = self._load_decoder(source.decoder).to(device)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape: tuple[int, int, int] = (self.unet.config.in_channels, height, width)
        self.vae_scale_factor: int = self._pipe.vae_scale_factor  # pixels per latent, along a side

    def _load(self, source: ModelSource) -> DiffusionPipeline:
        return load_pipeline(source, self.family, self.dtype)

    def _load_decoder(self, name: str) -> nn.Module:
        return load_decoder(name, self.dtype)

    def sampler(self, num_steps: int, eta: float, timesteps: str = MODEL) -> DDIM:
        """Returns the DDIM sampler made from this model's scheduler config."""
        config = dict(self._pipe.scheduler.config)
        return make_sampler(config, num_steps, eta, timesteps, self.device)

    def noise_schedule(self) -> NoiseSchedule:
        """Returns the noise schedule of this model's scheduler config."""
        return noise_schedule(dict(self._pipe.scheduler.config), self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns mixed precision for the UNet; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The text encoders' tokenizers, keyed by the names used in messages."""
        found = {"text encoder": self._pipe.tokenizer}
        if self.family == "sdxl":
            found["second text encoder"] = self._pipe.tokenizer_2
        return found

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Returns the conditioning of B prompts, each truncated to its tokenizer's length.

        The unconditional embeddings are diffusers' own without a negative prompt: the empty prompt's,
        or zeros if an SDXL pipeline has `force_zeros_for_empty_prompt`.
        """
        encoded = self._pipe.encode_prompt(
            prompt=readable(prompts),
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        if self.family == "sd15":
            return Conditioning(encoded[0], negative_prompt_embeds=encoded[1][:1])
        height, width = (side * self._pipe.vae_scale_factor for side in self.latent_shape[1:])
        size = [height, width, 0, 0, height, width]
        return Conditioning(
            prompt_embeds=encoded[0],
            negative_prompt_embeds=encoded[1][:1],
            pooled_prompt_embeds=encoded[2],
            negative_pooled_prompt_embeds=encoded[3][:1],
            time_ids=torch.tensor([size], dtype=encoded[0].dtype, device=self.device),
        )

    def use_loras(self, loras: Sequence[tuple[dict[str, Tensor], float]]) -> None:
        """Replaces the LoRAs in use; () for none.

        Each is diffusers' state dict of a LoRA whose alpha is its rank, and its weight.
        """
        self._pipe.unload_lora_weights()
        names = [f"lora_{i}" for i in range(len(loras))]
        for name, (weights, _) in zip(names, loras, strict=True):
            self._pipe.load_lora_weights(dict(weights), adapter_name=name)
        if names:
            self._pipe.set_adapters(names, [weight for _, weight in loras])

    def predict(
        self,
        unet: nn.Module,
        latents: Tensor,
        timesteps: Tensor | int,
        conditioning: Conditioning,
        guidance_scale: float,
        autocast: bool = True,
    ) -> Tensor:
        """Returns the guided output u + w (v - u) of `unet` at `latents` (n, C, h, w), fp32.

        `unet` is `self.unet` or a wrapper of it; `timesteps` is one timestep or (n,). Without a LoRA in
        use, which is in fp32, `autocast` may be off: as diffusers draws, and faster.
        """
        n = latents.shape[0]
        guided = guidance_scale != 1
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        if isinstance(timesteps, int):
            timesteps = torch.full((n,), timesteps, device=latents.device)  # waits for no GPU
        if guided:
            latents, timesteps = latents.repeat(2, 1, 1, 1), timesteps.repeat(2)
            embeds = _prepend(conditioning.negative_prompt_embeds, embeds)
            pooled = _prepend(conditioning.negative_pooled_prompt_embeds, pooled)
        added = None
        if self.family == "sdxl":
            time_ids = conditioning.time_ids.expand(len(latents), -1)
            added = {"text_embeds": pooled, "time_ids": time_ids}
        with self.autocast() if autocast else contextlib.nullcontext():
            output = unet(
                latents.to(self.dtype),
                timesteps,
                encoder_hidden_states=embeds,
                added_cond_kwargs=added,
                return_dict=False,
            )[0].float()
        if not guided:
            return output
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        noise: Tensor,
        scheduler: str,
        num_steps: int,
        guidance_scale: float,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """Returns images (n, 3, H, W) in [-1, 1] of n prompts by diffusers' own pipeline.

        They start from standard normal `noise` (n, C, h, w), which sets their size; `scheduler` is one
        of SCHEDULERS, and draws further noise from one generator per image.
        """
        own = self._pipe.scheduler
        height, width = (side * self.vae_scale_factor for side in noise.shape[-2:])
        try:
            # As in spo.method.ddim: a config that does not mention clipping means none.
            self._pipe.scheduler = SCHEDULERS[scheduler].from_config(
                {"clip_sample": False, **own.config}
            )
            # Compiled for a rollout's sizes, not for these.
            with torch.compiler.set_stance("eager_on_recompile"):
                latents = self._pipe(
                    readable(prompts),
                    height=height,
                    width=width,
                    latents=noise.to(self.device, self.dtype),
                    num_inference_steps=num_steps,
                    guidance_scale=guidance_scale,
                    generator=list(generators),
                    output_type="latent",
                ).images
                return self.decode(latents)
        finally:
            self._pipe.scheduler = own

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Returns latents (n, C, h, w), fp32, of images (n, 3, H, W) in [-1, 1].

        They are sampled from the VAE's posterior: mean + std `noise`, standard normal (n, C, h, w).
        """
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * noise
        if normal := normalisation(self.vae):
            mean, std = normal
            latents = (latents - mean) / std
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns images (n, 3, H, W) of latents (n, C, h, w), fp32 and not clamped to [-1, 1]."""
        return decode(self.vae, latents)

    @torch.no_grad()
    def decode_candidates(self, latents: Tensor) -> Tensor:
        """Returns the images of a rollout's candidates, by config.sample.decoder if that is set."""
        return decode(self.decoder, latents)


def _prepend(one: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Returns `one` (1, ...) once for each of `rows` (n, ...), then `rows`."""
    return None if rows is None else torch.cat([one.expand_as(rows), rows])
