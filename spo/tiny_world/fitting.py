"""The one loop that trains every network of the tiny world but the preference model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from spo.seeding import derive_seed

_SAVE_EVERY = 200  # steps


@dataclass(frozen=True)
class Fit:
    """How long and how fast to train."""

    steps: int
    learning_rate: float  # peak; linear warm-up over the first 5 %, then a cosine down to 0
    warmup: float = 0.05


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    rounds: Sequence[Fit],
    state_file: Path,
) -> None:
    """Minimise `loss`, a function of a generator, with AdamW; `network` ends with averaged weights.

    Each of the `rounds` starts from the averaged weights of the one before. The state is written next
    to `state_file` now and then, and the next call goes on from it: step by step the same numbers,
    since every step draws from a generator of its own.
    """
    for number, settings in enumerate(rounds):
        _fit_round(
            f"{name} {number}", network, loss, settings, state_file.with_suffix(f".{number}")
        )


def _fit_round(
    name: str,
    network: nn.Module,
    loss: Callable[[torch.Generator], Tensor],
    settings: Fit,
    state_file: Path,
) -> None:
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        start = state["step"]
    network.train()
    bar = tqdm(range(start, settings.steps), desc=name, initial=start, total=settings.steps)
    for step in bar:
        generator = torch.Generator().manual_seed(derive_seed(0, name, step))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step / settings.steps, settings.warmup)
        value = loss(generator)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
        if (step + 1) % _SAVE_EVERY == 0:
            _save(state_file, network, optimizer, average, step + 1)
    average.copy_to(parameters)
    network.eval()


def _schedule(progress: float, warmup: float) -> float:
    return min(progress / warmup, 1) * 0.5 * (1 + math.cos(math.pi * progress))


def _save(
    file: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: EMAModel,
    step: int,
) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict(),
        "step": step,
    }
    partial = file.with_name(f"{file.name}.tmp")  # not the .partial folder that is being filled
    torch.save(state, partial)
    partial.replace(file)
