"""The exponential moving average of the LoRA, which draws GradSPO's candidates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def update_ema(ema: Mapping[str, Tensor], policy: Mapping[str, Tensor], decay: float) -> None:
    """ema = decay ema + (1 - decay) policy, in place, tensor by tensor."""
    for name, average in ema.items():
        average.lerp_(policy[name], 1 - decay)


@torch.no_grad()
def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Euclidean distance between two sets of tensors with the same names, ()."""
    return torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum().sqrt()
