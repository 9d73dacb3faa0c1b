"""16-bit attention and the VAE at full size: values that are not finite, and distance from fp32."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.gpu_check.checks import Place
from spo.models.backbone import DTYPES

KINDS = ("fp16", "bf16")
# (rows, heads, tokens, channels of a head): largest self-attentions of the UNets, and the VAE's.
ATTENTIONS = {
    "sd15": (4, 8, 4096, 40),
    "sdxl": (2, 10, 4096, 64),
    "vae 512": (1, 1, 4096, 512),
    "vae 1024": (1, 1, 16384, 512),
}
SCALES = (1.0, 8.0)  # of queries and keys: at 8 logits reach hundreds


@torch.no_grad()
def overflow(place: Place) -> dict[str, Any]:
    """Returns counts of values that are not finite, and relative errors, by part and dtype."""
    device, found = torch.device(place.device), {}
    generator = torch.Generator(device).manual_seed(0)
    for name, (rows, heads, tokens, channels) in ATTENTIONS.items():
        shape = (1, heads, 64, channels) if place.small else (rows, heads, tokens, channels)
        for scale in SCALES:
            given = [torch.randn(shape, device=device, generator=generator) for _ in range(3)]
            given[0], given[1] = scale * given[0], scale * given[1]
            expected = F.scaled_dot_product_attention(*given)
            for kind in KINDS:
                output = F.scaled_dot_product_attention(*(part.to(DTYPES[kind]) for part in given))
                found[f"attention {name} x{scale:g} {kind}"] = against(output, expected)
    for family in ("sd15", "sdxl"):
        found |= decoded(family, place, device)
    bad = {name: value["not_finite"] for name, value in found.items() if value["not_finite"]}
    worst = max(value["relative_error"] for value in found.values())
    failures = [f"{name}: {count} values are not finite" for name, count in bad.items()]
    return {"summary": f"largest relative error {worst:.1e}", "parts": found, "failures": failures}


def decoded(family: str, place: Place, device: torch.device) -> dict[str, Any]:
    """Returns how the images of a full-size VAE with random weights fare in 16 bits."""
    from diffusers import AutoencoderKL

    folder = "small" if place.small else family
    config = AutoencoderKL.load_config(f"assets/architectures/{folder}/vae")
    side = 8 if place.small else {"sd15": 64, "sdxl": 128}[family]
    torch.manual_seed(0)
    with device:
        vae = AutoencoderKL.from_config(config).eval()
        latents = torch.randn(1, config["latent_channels"], side, side)
    expected = vae.decode(latents).sample
    found = {}
    for kind in KINDS:
        output = deepcopy(vae).to(DTYPES[kind]).decode(latents.to(DTYPES[kind])).sample
        found[f"vae {family} {kind}"] = against(output, expected)
    return found


def against(output: Tensor, expected: Tensor) -> dict[str, float]:
    difference = (output.float() - expected).nan_to_num()
    return {
        "not_finite": int((~output.isfinite()).sum()),
        "relative_error": (difference.norm() / expected.norm()).item(),
    }
