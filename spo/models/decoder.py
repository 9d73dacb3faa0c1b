"""Latents -> images, by the base model's VAE or by a tiny decoder for a rollout's candidates."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import PREFETCH, model_file
from spo.models.weights import fetch, load_part

_KEY = "sample.decoder"
# AutoencoderTiny saves a value that it does not load.
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: "'block_out_channels'" not in record.getMessage()
)


def decode(autoencoder: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    """Returns images (n, 3, H, W) of the UNet's latents (n, C, h, w): fp32, not clamped."""
    # 0.18215 for SD1.5's VAE; 1 for TAESD, which takes the UNet's latents.
    scaled, factor = latents.to(autoencoder.dtype), autoencoder.config.scaling_factor
    if normal := normalisation(autoencoder):
        mean, std = normal
        scaled = scaled * std / factor + mean
    else:
        scaled = scaled / factor
    return autoencoder.decode(scaled, return_dict=False)[0].float()


def pixels_per_latent(vae_config: Mapping[str, Any]) -> int:
    """Returns a VAE's pixels per latent along a side, as diffusers' pipelines compute it."""
    return 2 ** (len(vae_config.get("block_out_channels", (64,))) - 1)  # diffusers' default


def vae_without_weights(config: Mapping[str, Any]) -> AutoencoderKL:
    """Returns a VAE that only tells its config: nothing is encoded or decoded."""
    with init_empty_weights():
        vae = AutoencoderKL.from_config(config)
    for name, _ in list(vae.named_children()):
        setattr(vae, name, None)
    vae.none = nn.Parameter(torch.empty(0))  # diffusers asks every network for its dtype
    return vae


def normalisation(autoencoder: AutoencoderKL | AutoencoderTiny) -> list[Tensor] | None:
    """Returns mean and deviation (C, 1, 1) of a VAE's latents, if the UNet's do not have them."""
    values = [autoencoder.config.get(name) for name in ("latents_mean", "latents_std")]
    if None in values:
        return None
    like = {"dtype": autoencoder.dtype, "device": autoencoder.device}
    return [torch.tensor(value, **like).view(-1, 1, 1) for value in values]


def load_decoder(name: str, dtype: torch.dtype) -> AutoencoderTiny:
    """Loads the AutoencoderTiny of a folder or Hub id, on the CPU, frozen; UserError if it cannot."""
    try:
        tiny = load_part(AutoencoderTiny, fetch(name, [""], _KEY), "", dtype)
    except LOAD_ERRORS as error:
        raise UserError(
            f"{_KEY}: {name!r} cannot be loaded ({first_line(error)}); to download and check it: "
            f"{PREFETCH}"
        ) from error
    return tiny.requires_grad_(False).eval()


def check_decoder(name: str, vae: Path) -> None:
    """Raises UserError unless `name` is an AutoencoderTiny that fits the VAE with config file `vae`.

    Reads only small json files.
    """
    tiny = _shapes(AutoencoderTiny, model_file(name, "config.json", _KEY), _KEY)
    base = _shapes(AutoencoderKL, vae, "pretrained")
    if tiny.channels != base.channels:
        raise UserError(
            f"{_KEY}: {name!r} decodes latents of {tiny.channels} channels, but those of the base "
            f"model have {base.channels}; name the decoder that was made for it."
        )
    if tiny.image != base.image:
        raise UserError(
            f"{_KEY}: {name!r} makes {tiny.image} of one latent, but the base model's VAE "
            f"{base.image} (channels, height, width); name the decoder that was made for it."
        )


@dataclass(frozen=True)
class _Shapes:
    channels: int  # of latents
    image: tuple[int, ...]  # (channels, height, width) that one latent becomes


def _shapes(kind: type[AutoencoderKL] | type[AutoencoderTiny], file: Path, key: str) -> _Shapes:
    """Returns the shapes of the autoencoder of class `kind` that a config file describes."""
    try:
        config = json.loads(file.read_text())
        found = config.get("_class_name")
        if found == kind.__name__:
            with torch.device("meta"), torch.no_grad():
                model = kind.from_config(config)
                latent = torch.ones(1, model.config.latent_channels, 1, 1)
                return _Shapes(latent.shape[1], tuple(model.decode(latent).sample.shape[1:]))
    except Exception as error:  # whatever a constructor raises for nonsense
        raise UserError(
            f"{key}: {file} does not describe an {kind.__name__} ({first_line(error)})."
        ) from error
    raise UserError(f"{key}: {file} is that of a {found}, not of an {kind.__name__}.")
