"""Named numbers of a rollout and its training, averaged over processes; one line per number."""

import re
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo.types import Comparison


class Metrics:
    """Sums by name, kept on the device so that adding to them never waits for a GPU."""

    def __init__(self, device: torch.device, sums: Mapping[str, Tensor] | None = None) -> None:
        self.device = device
        self.sums = dict(sums or {})  # () fp64 each

    def mean(self, name: str, values: Tensor) -> None:
        """Adds every element of `values` to the mean `name`."""
        self._add(f"sum:{name}", values.detach().sum(dtype=torch.float64))
        self._add(f"count:{name}", values.numel())

    def total(self, name: str, value: Tensor | int) -> None:
        """Adds a number to the total `name`."""
        self._add(f"total:{name}", value)

    def _add(self, name: str, value: Tensor | int) -> None:
        if not isinstance(value, Tensor):  # torch.tensor(value) would wait for the GPU
            value = torch.full((), value, dtype=torch.float64, device=self.device)
        self.sums[name] = self.sums.get(name, 0) + value.to(self.device, torch.float64)


def summary(sums: Mapping[str, float]) -> dict[str, Any]:
    """Returns means and totals by name, from sums over processes; "a/b" becomes entry b of a."""
    line: dict[str, Any] = {}
    for key, value in sums.items():
        kind, _, name = key.partition(":")
        group, slash, entry = name.partition("/")
        if kind == "sum":
            count = sums[f"count:{name}"]
            line[name] = value / count if count else None
        elif kind == "total" and slash:
            line.setdefault(group, {})[entry] = int(value)
        elif kind == "total":
            line[name] = int(value)
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
