"""Sizes of rollouts and updates on any number of processes (one process drives one GPU)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ml_collections import ConfigDict

from spo.errors import UserError

MAX_PROCESSES = 64  # how far an error looks for process counts that work


@dataclass(frozen=True)
class UpdatePlan:
    """What every process does for one optimizer step."""

    num_processes: int
    minibatch_size: int  # pairs of one minibatch on one process
    accumulation_steps: int  # minibatches of one optimizer step

    @property
    def pairs_per_update(self) -> int:
        """Pairs of one optimizer step over all processes."""
        return self.minibatch_size * self.num_processes * self.accumulation_steps

    @property
    def processes(self) -> str:
        return _count(self.num_processes, "process", "es")

    def describe(self) -> str:
        """Returns the plan in one line."""
        accumulation = _count(self.accumulation_steps, "accumulation step")
        return (
            f"minibatch {self.minibatch_size} x {self.processes} x {accumulation} = "
            f"{self.pairs_per_update} pairs per update"
        )


@dataclass(frozen=True)
class BatchPlan(UpdatePlan):
    """What every process does between two updates, and the totals over all processes."""

    prompts_per_rollout: int  # over all processes
    slices: int  # rollouts that each process makes before it trains
    slice_size: int  # prompts of one slice on one process

    def describe(self) -> str:
        """Returns the plan in one line."""
        share = f"{_count(self.slice_size, 'prompt')} x {_count(self.slices, 'slice')} each"
        rollout = f"{share} per rollout ({self.prompts_per_rollout} in all)"
        return f"{self.processes}: {rollout}; {super().describe()}"


def plan_batches(config: ConfigDict, num_processes: int) -> BatchPlan:
    """Returns the sizes that keep the config's global numbers on `num_processes` processes.

    The batch sizes are upper limits, of prompts in a slice and of pairs in a minibatch; if a global
    number is None they are taken unchanged. Raises UserError if a global number does not
    divide by the processes.
    """
    sample, train = config.sample, config.train
    _check_sizes(num_processes, sample=sample, train=train)
    steps = train.gradient_accumulation_steps
    if train.global_batch_size is not None and steps is not None:
        raise UserError(
            f"train.gradient_accumulation_steps: it follows from train.global_batch_size="
            f"{train.global_batch_size}; set that to None to choose the accumulation yourself"
        )
    slices, slice_size = _split(sample, num_processes)
    accumulation_steps, minibatch_size = _split(train, num_processes)
    return BatchPlan(
        num_processes,
        minibatch_size,
        steps or accumulation_steps,
        prompts_per_rollout=slices * slice_size * num_processes,
        slices=slices,
        slice_size=slice_size,
    )


def plan_updates(config: ConfigDict, num_processes: int) -> UpdatePlan:
    """Returns the sizes of updates without rollouts; raises the errors of `plan_batches`."""
    _check_sizes(num_processes, train=config.train)
    accumulation_steps, minibatch_size = _split(config.train, num_processes)
    return UpdatePlan(num_processes, minibatch_size, accumulation_steps)


def _split(section: Mapping[str, int | None], num_processes: int) -> tuple[int, int]:
    """Returns (number of parts, size of a part) of a process's share of the global batch.

    The parts are equal and as large as batch_size allows.
    """
    total, limit = section["global_batch_size"], section["batch_size"]
    if total is None:
        return 1, limit
    share = total // num_processes
    size = max(n for n in range(1, min(share, limit) + 1) if share % n == 0)
    return share // size, size


def _check_sizes(num_processes: int, **sections: Mapping[str, int | None]) -> None:
    """Raises UserError for a size below 1 or a global number that does not divide."""
    for name, section in sections.items():
        for key in ("batch_size", "global_batch_size", "gradient_accumulation_steps"):
            value = section.get(key)
            if value is not None and value < 1:
                raise UserError(f"{name}.{key} = {value}: must be at least 1")
    totals = {f"{name}.global_batch_size": s["global_batch_size"] for name, s in sections.items()}
    totals = {key: total for key, total in totals.items() if total is not None}
    broken = {key: total for key, total in totals.items() if total % num_processes}
    if not broken:
        return
    common = math.gcd(*totals.values())
    working = [str(n) for n in range(1, MAX_PROCESSES + 1) if common % n == 0]
    numbers = " and ".join(f"{key} = {total}" for key, total in broken.items())
    lift = " ".join(f"--config.{key}=None" for key in broken)
    raise UserError(
        f"{numbers} cannot be shared equally by {num_processes} processes; "
        f"process counts that work: {', '.join(working)}; without the constraint: {lift}"
    )


def _count(number: int, word: str, ending: str = "s") -> str:
    return f"{number} {word}{ending if number != 1 else ''}"
