"""The loop that trains every network of the tiny world except the preference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from spo.atomic import replacing
from spo.seeding import derive_seed

_SAVE_EVERY = 200  # steps
_WARMUP = 0.05  # share of the steps

Loss = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Fit:
    """The length and speed of one round of training."""

    steps: int
    learning_rate: float  # peak; linear warm-up over the first 5 %, then a cosine down to 0


def fit(name: str, network: nn.Module, loss: Loss, rounds: Sequence[Fit], state_file: Path) -> None:
    """Minimises `loss`, a function of a generator, with AdamW; `network` ends with averaged weights.

    Each round starts from the averaged weights of the round before. The state is saved beside
    `state_file` every 200 steps, and the next call continues from there with the same numbers, since
    every step draws from a generator of its own.
    """
    for number, settings in enumerate(rounds):
        file = state_file.with_suffix(f".{number}")
        _fit_round(f"{name} {number}", network, loss, settings, file)


def _fit_round(name: str, network: nn.Module, loss: Loss, settings: Fit, file: Path) -> None:
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    parts = {"network": network, "optimizer": optimizer, "average": average}
    start = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        start = state["step"]
        for part, holder in parts.items():
            holder.load_state_dict(state[part])
    network.train()
    bar = tqdm(range(start, settings.steps), desc=name, initial=start, total=settings.steps)
    for step in bar:
        generator = torch.Generator().manual_seed(derive_seed(0, name, step))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step / settings.steps)
        value = loss(generator)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % _SAVE_EVERY == 0:
            state = {part: holder.state_dict() for part, holder in parts.items()}
            with replacing(file) as partial:
                torch.save(state | {"step": step + 1}, partial)
    average.copy_to(parameters)
    network.eval()


def _rate(progress: float) -> float:
    """Returns the share of the peak learning rate at `progress` from 0 to 1."""
    return min(progress / _WARMUP, 1) * 0.5 * (1 + math.cos(math.pi * progress))
