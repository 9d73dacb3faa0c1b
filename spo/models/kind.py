"""Tells by the config files of a base model what kind it is, and refuses kinds that cannot run here."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from diffusers.schedulers import KarrasDiffusionSchedulers

from spo.method.ddim import ddim_scheduler

Config = Mapping[str, Any]

# The schedulers of diffusers that sample with betas; others are of other kinds of models.
_OF_BETAS = {each.name for each in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
_OTHER_SCHEDULERS = {
    "Flow": "a flow matching model",
    "EDM": "an EDM model",
    "LCM": "a consistency model (LCM)",
    "TCD": "a consistency model (TCD)",
    "SCM": "a consistency model",
    "Consistency": "a consistency model",
}
_UNET_INPUTS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


def check_kind(family: str, configs: Mapping[str, Config]) -> None:
    """Raises ValueError, saying what the model is, unless `configs` describe a text-to-image DDPM.

    They are those of the parts, by their names in the pipeline.
    """
    for fault in chain(_of_unet(family, configs), _of_scheduler(configs["scheduler"])):
        raise ValueError(fault)
    for name, config in configs.items():
        if config.get("quantization_config"):
            raise ValueError(f"its {name} is quantized; name the model in fp16 or fp32")
    vae = configs["vae"]
    if family == "sd15" and vae.get("latents_mean") and vae.get("latents_std"):
        raise ValueError(
            "its VAE has latents_mean and latents_std, as SDXL's may have, not SD1.5's"
        )
    ddim_scheduler(configs["scheduler"])


def _of_unet(family: str, configs: Mapping[str, Config]) -> Iterator[str]:
    unet, latents = configs["unet"], configs["vae"].get("latent_channels", 4)
    channels, made = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if made == latents and channels == 2 * latents + 1:
        yield f"it is an inpainting model: its UNet has {channels} input channels, of image and mask"
    if made == latents and channels == 2 * latents:
        yield f"it is a model that edits images: its UNet has {channels} input channels"
    if (channels, made) != (latents, latents):
        yield (
            f"its UNet reads latents of {channels} channels and makes {made}, but its VAE's have "
            f"{latents}; set pretrained.vae to the VAE that it was trained with"
        )
    size = unet.get("sample_size")
    if not isinstance(size, int) and not (isinstance(size, list | tuple) and len(size) == 2):
        yield f"its UNet has sample_size {size}; set it in unet/config.json to that of its latents"
    sdxl = family == "sdxl"
    if sdxl and ("text_encoder" not in configs or _reads_aesthetics(unet, configs)):
        yield "it is SDXL's refiner, which goes on from another model's latents"
    if unet.get("time_cond_proj_dim"):
        yield "it is a consistency model (LCM): its UNet reads the guidance scale"
    for name in (name for name in _UNET_INPUTS if unet.get(name)):
        yield f"its UNet has {name}={unet[name]!r}, an input that {family} does not have"
    if unet.get("addition_embed_type") != ("text_time" if sdxl else None):
        yield f"its UNet has addition_embed_type={unet.get('addition_embed_type')!r}, not {family}'s"
    widths = [_text_width(c) for name, c in configs.items() if name.startswith("text_encoder")]
    if None not in widths and sum(widths) != (width := unet.get("cross_attention_dim", 1280)):
        yield f"its UNet reads text of width {width}, but its text encoders make {sum(widths)}"


def _reads_aesthetics(unet: Config, configs: Mapping[str, Config]) -> bool:
    """Tells if a UNet takes five numbers beside the pooled text: size, crop and a score."""
    pooled = configs.get("text_encoder_2", {}).get("projection_dim", 512)
    per_number = unet.get("addition_time_embed_dim")
    return unet.get("projection_class_embeddings_input_dim") == pooled + 5 * (per_number or 0)


def _text_width(config: Config) -> int | None:
    """Returns the numbers per token of a text encoder's output."""
    return config.get("hidden_size") or config.get("text_config", {}).get("hidden_size")


def _of_scheduler(config: Config) -> Iterator[str]:
    name = str(config.get("_class_name"))
    if name.replace("Parallel", "") not in _OF_BETAS:
        kinds = [kind for part, kind in _OTHER_SCHEDULERS.items() if part in name]
        yield f"it is {(kinds or ['another kind of model'])[0]}, by its {name}"
    if config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type")):
        yield f"it is a flow matching model, by its {name}'s config"
    if config.get("timestep_type") == "continuous":
        yield f"it is an EDM model: its {name} has timestep_type continuous"
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") in (None, "epsilon"):
        yield (
            "its scheduler has rescale_betas_zero_snr, but it predicts epsilon, which at the last "
            "timestep says nothing of the image; is its prediction_type v_prediction?"
        )
