"""Heads that read one number from features, by linear layers with nothing between them.

So published: LAION's aesthetic predictor and ImageReward have commented out the activations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn


def linear_head(weights: Mapping[str, Tensor], width: int) -> nn.Sequential:
    """Linear layers from features (n, width) to (n, 1), in eval mode.

    `weights`: "layers.0.weight", "layers.0.bias", "layers.2.weight", ..., or "weight" and "bias" alone.
    ValueError where they are others, or do not fit one another.
    """
    names = {name.removesuffix("weight") for name in weights if name.endswith("weight")}
    if not all(re.fullmatch(r"(layers\.\d\.)?", name) for name in names):
        raise ValueError(f"it has other layers: {min(names)}")
    if weights.keys() != {f"{name}{part}" for name in names for part in ("weight", "bias")}:
        raise ValueError("its weights are not those of linear layers")
    layers = []
    for name in sorted(names):
        weight, bias = weights[f"{name}weight"].float(), weights[f"{name}bias"].float()
        if weight.ndim != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}weight is {tuple(weight.shape)} after features of {width}")
        width = len(weight)
        layer = nn.Linear(weight.shape[1], width)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    if not layers or width != 1:
        raise ValueError("it does not end in one number")
    return nn.Sequential(*layers).requires_grad_(False).eval()
