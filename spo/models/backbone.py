"""SD1.5 or SDXL behind one interface: load, encode prompts and images, guided prediction, decode.

The only file that knows which family a model is of: the entries of `_PIPELINES` and the questions
after `family` below.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from spo.command_line.values import expand
from spo.data.token_lengths import readable
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import PREFETCH, model_file
from spo.method.ddim import DDIM, NoiseSchedule, make_sampler, noise_schedule
from spo.models.decoder import check_decoder, decode, load_decoder
from spo.types import Conditioning

_PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
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


@dataclass(frozen=True)
class ModelSource:
    """Where a base model comes from; `config.pretrained` explains each."""

    model: str
    revision: str | None = None
    variant: str | None = None
    vae: str | None = None
    unet: str | None = None  # a repo or folder whose subfolder `unet` replaces the model's own
    decoder: str | None = None  # config.sample.decoder


def model_source(pretrained: Mapping[str, str | None], decoder: str | None = None) -> ModelSource:
    """Returns the source that `config.pretrained` describes, ~ expanded; `decoder` for candidates."""
    paths = {name: expand(pretrained[name]) for name in ("model", "vae")}
    return ModelSource(**{**pretrained, **paths}, decoder=expand(decoder))


def family_of(model: str, key: str) -> str:
    """The family of a folder or Hub id; UserError, naming the config `key`, where it has none."""
    found = _class_name(model, key)
    for family, pipeline in _PIPELINES.items():
        if pipeline.__name__ == found:
            return family
    raise UserError(f"{key}: {model!r} is a {found}, not an SD1.5 or SDXL pipeline.")


def check_source(source: ModelSource, family: str, key: str = "pretrained.model") -> None:
    """Raise UserError, naming the config `key`, unless `source` is a pipeline of `family`.

    Reads small json files.
    """
    if family not in _PIPELINES:
        raise UserError(f"family: {family!r} is none of {', '.join(_PIPELINES)}.")
    vae = None
    if source.vae is not None:
        vae = model_file(source.vae, "config.json", "pretrained.vae")
    found = _class_name(source.model, key, source.revision)
    wanted = _PIPELINES[family].__name__
    if found != wanted:
        raise UserError(
            f"{key}: {source.model!r} is a {found}, but family={family!r} needs a {wanted}; change "
            "the model or family."
        )
    if source.decoder is not None:
        own = vae or model_file(source.model, "vae/config.json", key, source.revision)
        check_decoder(source.decoder, own)


def _class_name(model: str, key: str, revision: str | None = None) -> str | None:
    file = model_file(model, "model_index.json", key, revision)
    try:
        return json.loads(file.read_text()).get("_class_name")
    except ValueError as error:
        raise UserError(f"{key}: {file} is not a JSON file: {error}") from error


def load_pipeline(
    source: ModelSource, family: str, dtype: torch.dtype
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """The diffusers pipeline of a base model, on the CPU, frozen, without a safety checker.

    Raises UserError when weights are missing or malformed.
    """
    options = {"dtype": dtype, "revision": source.revision, "variant": source.variant}
    if family == "sd15":
        options |= {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
    try:
        if source.vae is not None:
            options["vae"] = AutoencoderKL.from_pretrained(source.vae, dtype=dtype)
        if source.unet is not None:
            options["unet"] = UNet2DConditionModel.from_pretrained(
                source.unet, subfolder="unet", dtype=dtype
            )
        pipe = _PIPELINES[family].from_pretrained(source.model, **options)
    except LOAD_ERRORS as error:
        raise UserError(
            f"pretrained: {source.model!r} (vae {source.vae!r}, unet {source.unet!r}) cannot be loaded "
            f"({first_line(error)}); to download and check it: {PREFETCH}"
        ) from error
    return freeze(pipe, family, dtype)


def freeze(pipe: DiffusionPipeline, family: str, dtype: torch.dtype) -> DiffusionPipeline:
    """`pipe` frozen, and with a VAE in fp32 where its own dtype would overflow."""
    # SDXL's own VAE overflows in fp16 and its config says so; SD1.5's does not and has the same flag.
    if family == "sdxl" and dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return pipe


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
        self.latent_shape: tuple[int, int, int] = (self.unet.config.in_channels, size, size)
        self.vae_scale_factor: int = self._pipe.vae_scale_factor  # pixels per latent, along a side

    def _load(self, source: ModelSource) -> DiffusionPipeline:
        return load_pipeline(source, self.family, self.dtype)

    def _load_decoder(self, name: str) -> nn.Module:
        return load_decoder(name, self.dtype)

    def sampler(self, num_steps: int, eta: float, timesteps: str = "leading") -> DDIM:
        """Returns the DDIM sampler made from this model's scheduler config."""
        config = dict(self._pipe.scheduler.config)
        return make_sampler(config, num_steps, eta, timesteps, self.device)

    def noise_schedule(self) -> NoiseSchedule:
        """Returns the noise schedule of this model's scheduler config."""
        return noise_schedule(dict(self._pipe.scheduler.config), self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for the UNet; nothing in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Those of the text encoders, by what messages call these."""
        found = {"text encoder": self._pipe.tokenizer}
        if self.family == "sdxl":
            found["second text encoder"] = self._pipe.tokenizer_2
        return found

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of B prompts, each truncated to its tokenizer's length.

        The unconditional embeddings are what diffusers takes without a negative prompt: those of the
        empty prompt, or zeros where an SDXL pipeline has `force_zeros_for_empty_prompt`.
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
        """Put LoRAs in the place of those that were in use; () for none.

        Each is diffusers' state dict of one whose alpha is its rank, and its weight.
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
        """Guided output of `unet`, u + w (v - u), at `latents` (n, C, h, w): fp32, same shape.

        `unet` is `self.unet` or a wrapper of it; `timesteps` is one timestep or (n,). Where no LoRA is
        in use, which is in fp32, it works without `autocast`, too: as diffusers draws, and faster.
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
        """Images (n, 3, H, W) in [-1, 1] of n prompts by diffusers' own pipeline.

        They start from standard normal `noise` (n, C, h, w), whose size is theirs; `scheduler` is one
        of SCHEDULERS, and draws what noise it needs besides from one generator per image.
        """
        own = self._pipe.scheduler
        height, width = (side * self.vae_scale_factor for side in noise.shape[-2:])
        try:
            # As in spo.method.ddim: a config that says nothing of clipping means none.
            self._pipe.scheduler = SCHEDULERS[scheduler].from_config(
                {"clip_sample": False, **own.config}
            )
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
        finally:
            self._pipe.scheduler = own
        return self.decode(latents)

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Latents (n, C, h, w), fp32, of images (n, 3, H, W) in [-1, 1].

        They are sampled from the VAE's posterior: mean + std `noise`, standard normal (n, C, h, w).
        """
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * noise
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (n, 3, H, W) of `latents` (n, C, h, w): fp32, nominally in [-1, 1], not clamped."""
        return decode(self.vae, latents)

    @torch.no_grad()
    def decode_candidates(self, latents: Tensor) -> Tensor:
        """As `decode`, for what a rollout scores: by config.sample.decoder where that is set."""
        return decode(self.decoder, latents)


def _prepend(one: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """`one` (1, ...) once for each of `rows` (n, ...), then `rows`."""
    return None if rows is None else torch.cat([one.expand_as(rows), rows])
