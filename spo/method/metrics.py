"""Named numbers of a rollout and its training, averaged over processes; one line per number."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.types import Comparison, NoisePredictions, PreferencePairs

if TYPE_CHECKING:
    from spo.method.ddim import DDIM


class Metrics:
    """Sums by name, kept on the device so that adding to them never waits for a GPU."""

    def __init__(self, device: torch.device, sums: Mapping[str, Tensor] | None = None) -> None:
        self.device = device
        self.sums = dict(sums or {})  # () fp64 each

    def mean(self, name: str, values: Tensor) -> None:
        """Adds every element of `values` to the mean `name`."""
        self._add(f"sum:{name}", values.detach().sum(dtype=torch.float64))
        self._add(f"count:{name}", values.numel())

    def nanmean(self, name: str, values: Tensor) -> None:
        """Adds those of `values` that are not NaN to the mean `name`."""
        self._add(f"sum:{name}", values.nansum(dtype=torch.float64))
        self._add(f"count:{name}", values.isnan().logical_not().sum())

    def total(self, name: str, value: Tensor | int) -> None:
        """Adds a number to the total `name`."""
        self._add(f"total:{name}", value)

    def _add(self, name: str, value: Tensor | int) -> None:
        if not isinstance(value, Tensor):  # torch.tensor(value) would wait for the GPU
            value = torch.full((), value, dtype=torch.float64, device=self.device)
        self.sums[name] = self.sums.get(name, 0) + value.to(self.device, torch.float64)


def summary(sums: Mapping[str, float]) -> dict[str, Any]:
    """Returns means and totals by name, from sums over processes.

    "a/b" becomes entry b of a. A mean of nothing is None; as an entry it is left out.
    """
    line: dict[str, Any] = {}
    for key, value in sums.items():
        kind, _, name = key.partition(":")
        if kind == "count":
            continue
        count = sums[f"count:{name}"] if kind == "sum" else None
        number = int(value) if count is None else value / count if count else None
        group, slash, entry = name.partition("/")
        if not slash:
            line[name] = number
        elif number is not None:
            line.setdefault(group, {})[entry] = number
    return line


def note_rollout(
    metrics: Metrics,
    comparisons: Sequence[Comparison],
    pair_timesteps: Tensor,
    timesteps: Sequence[int],
) -> None:
    """Adds the scores of a rollout, and the number of pairs at each of `timesteps`."""
    for comparison in comparisons:
        scores = comparison.scores
        metrics.mean("score_mean", scores.mean(dim=0))
        metrics.mean("score_spread", scores.std(dim=0))
        metrics.mean("win_margin", comparison.gaps)
        metrics.total("comparisons", scores.shape[1])
        metrics.total("images", scores.numel())
    metrics.total("pairs", len(pair_timesteps))
    for timestep in timesteps:
        metrics.total(f"pairs_at/{timestep}", (pair_timesteps == timestep).sum())


@torch.no_grad()
def divergence(predictions: NoisePredictions, pairs: PreferencePairs, sampler: DDIM) -> Tensor:
    """Returns KL(policy || reference) of the transition of each pair, in nats, (n,).

    The exact divergence of N(mean_policy, sigma^2) from N(mean_reference, sigma^2), summed over
    C, h, w; of a pair with two x_t the mean of both. NaN where sigma is 0, or x_t is noise alone.
    """
    n, latents_each = pairs.latents.shape[:2]
    latents = pairs.latents.flatten(0, 1)
    timesteps = pairs.timesteps.repeat_interleave(latents_each)

    def transition(epsilon: Tensor) -> tuple[Tensor, Tensor]:
        prediction = sampler.of_epsilon(epsilon.flatten(0, 1), latents, timesteps)
        return sampler.transition(prediction, timesteps, latents)

    (mean, sigma), (reference, _) = map(transition, (predictions.policy, predictions.reference))
    known = (sigma > 0) & (sampler.noise_level(timesteps, latents) < 1)
    shift = (mean - reference) / sigma.masked_fill(~known, torch.nan)
    return shift.square().flatten(1).sum(dim=1).unflatten(0, (n, latents_each)).mean(dim=1) / 2


def time_left(seconds: float, prompts: int, prompts_left: int) -> str:
    """Returns a line with the rate of a rollout and its training, and how long the rest takes."""
    each = seconds / prompts
    hours = each * prompts_left / 3600
    rest = f"{hours:.3g} hours" if hours >= 1 else f"{hours * 60:.3g} minutes"
    return (
        f"rate: {each:.3g} s for a prompt and its pairs; at this rate the {prompts_left} prompts that "
        f"are left take {rest}"
    )


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak so far: the allocator's on a GPU, the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    # Linux' rusage includes the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
