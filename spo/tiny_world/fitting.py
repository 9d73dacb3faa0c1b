"""The loop that trains every network of the tiny world except the preference model."""

import math
from collections.abc import Callable, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import trange

from spo.seeding import derive_seed

# (steps, peak learning rate) of each round: linear warm-up over the first 5 %, then a cosine to 0.
Rounds = Sequence[tuple[int, float]]


def fit(
    name: str, network: nn.Module, loss: Callable[[torch.Generator], Tensor], rounds: Rounds
) -> None:
    """Minimises `loss`, a function of a generator, with AdamW; `network` ends with averaged weights.

    Each round starts from the averaged weights of the round before, and each step draws from a
    generator of its own.
    """
    parameters = list(network.parameters())
    network.train()
    for number, (steps, learning_rate) in enumerate(rounds):
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
        average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
        for step in (bar := trange(steps, desc=f"{name} {number}")):
            progress = step / steps
            rate = min(progress / 0.05, 1) * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.param_groups[0]["lr"] = learning_rate * rate
            seed = derive_seed(0, f"{name} {number}", step)
            value = loss(torch.Generator().manual_seed(seed))
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(parameters)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}")
        average.copy_to(parameters)
    network.eval()
