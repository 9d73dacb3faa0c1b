"""The families of base models: one row for everything that differs by family and needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A family of base models, by its published one."""

    pipeline: str  # class of diffusers
    base_model: str  # Hub id of the published model
    license: str  # of `base_model`, by the Hub's identifier
    tag: str  # of the Hub
    text_encoder_in_file: str  # begins the names of its last text encoder in a file of all weights
    prompt_embeds_width: int  # numbers per token that the attention `attn2` reads
    kohya_version: str  # `ss_base_model_version` of sd-scripts
    architecture: str  # `modelspec.architecture` of https://github.com/Stability-AI/ModelSpec


# By `config.family`; config/NAME.py holds the settings of a training.
FAMILIES = {
    "sd15": Family(
        pipeline="StableDiffusionPipeline",
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        license="creativeml-openrail-m",
        tag="stable-diffusion",
        text_encoder_in_file="cond_stage_model.transformer.",
        prompt_embeds_width=768,
        kohya_version="sd_v1",
        architecture="stable-diffusion-v1/lora",
    ),
    "sdxl": Family(
        pipeline="StableDiffusionXLPipeline",
        base_model="stabilityai/stable-diffusion-xl-base-1.0",
        license="openrail++",
        tag="stable-diffusion-xl",
        text_encoder_in_file="conditioner.embedders.1.model.",
        prompt_embeds_width=2048,
        kohya_version="sdxl_base_v1-0",
        architecture="stable-diffusion-xl-v1-base/lora",
    ),
}
