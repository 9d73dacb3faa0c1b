"""Variants of a config against each other: timed in turns, so that a machine's moods meet them all."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from ml_collections import ConfigDict

from spo.costs.measure import Part, Work, count_work, parts_of, time_parts
from spo.costs.meter import Models
from spo.launch.batch_plan import plan_batches

BASELINE = "baseline"


@dataclass(frozen=True)
class Turn:
    """What one variant took while its models were in memory."""

    seconds: Mapping[str, tuple[float, ...]]  # of each part
    peak_bytes: int | None  # of the GPU's allocator; None on a CPU


@dataclass(frozen=True)
class Measured:
    """A variant over all rounds."""

    work: Work
    turns: tuple[Turn, ...]

    def parts(self) -> dict[str, Part]:
        """All repeats of all rounds as one."""
        names = self.turns[0].seconds
        return parts_of(self.work, {n: sum((t.seconds[n] for t in self.turns), ()) for n in names})

    def ratios(self, part: str, baseline: Measured) -> tuple[float, ...]:
        """How many times the rate of the baseline this is, round by round.

        Rates are prompts, pairs or updates per second, since a variant may do more of them at once.
        """
        work = self.work.units(part) / baseline.work.units(part)
        return tuple(
            work * statistics.median(then.seconds[part]) / statistics.median(now.seconds[part])
            for then, now in zip(baseline.turns, self.turns, strict=True)
        )

    @property
    def peak_bytes(self) -> int | None:
        return max(turn.peak_bytes or 0 for turn in self.turns) or None


def compare(
    configs: Mapping[str, ConfigDict],
    load: Callable[[ConfigDict], Models],
    rounds: int,
    repeats: int,
) -> dict[str, Measured]:
    """Every config in turn, `rounds` times; in a turn its models load, warm up, and are measured.

    One config's models are in memory at a time.
    """
    work: dict[str, Work] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in configs}
    for _ in range(rounds):
        for name, config in configs.items():
            plan, models = plan_batches(config, 1), load(config)
            if name not in work:
                work[name] = count_work(models, plan)
            seconds = time_parts(models, plan, repeats)
            turns[name].append(Turn(seconds, _peak_bytes(models.backbone.device)))
            del models
            _forget()
    return {name: Measured(work[name], tuple(turns[name])) for name in configs}


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _forget() -> None:
    """Free the last models' memory, and what torch.compile keeps of them."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
