"""Sizes of rollouts and updates on any number of processes (one process drives one GPU)."""

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

    def describe(self) -> str:
        """The plan in one line."""
        processes = _count(self.num_processes, "process", "processes")
        accumulation = _count(self.accumulation_steps, "accumulation step", "accumulation steps")
        return (
            f"minibatch {self.minibatch_size} x {processes} x {accumulation} = "
            f"{self.pairs_per_update} pairs per update"
        )


@dataclass(frozen=True)
class BatchPlan(UpdatePlan):
    """What every process does between two updates, and what that makes in all."""

    prompts_per_rollout: int  # over all processes
    slices: int  # rollouts that each process makes before it trains
    slice_size: int  # prompts of one slice on one process

    def describe(self) -> str:
        """The plan in one line."""
        processes = _count(self.num_processes, "process", "processes")
        slices = _count(self.slices, "slice", "slices")
        prompts = _count(self.slice_size, "prompt", "prompts")
        return (
            f"{processes}: {prompts} x {slices} each per rollout ({self.prompts_per_rollout} in "
            f"all); {super().describe()}"
        )


def plan_batches(config: ConfigDict, num_processes: int) -> BatchPlan:
    """The sizes that `config` makes on `num_processes` processes; raises what `fit_batches` does."""
    return fit_batches(
        num_processes,
        config.sample.batch_size,
        config.sample.global_batch_size,
        config.train.batch_size,
        config.train.global_batch_size,
        config.train.gradient_accumulation_steps,
    )


def fit_batches(
    num_processes: int,
    sample_batch_size: int,
    sample_global_batch_size: int | None,
    train_batch_size: int,
    train_global_batch_size: int | None,
    gradient_accumulation_steps: int | None,
) -> BatchPlan:
    """Keeps the global numbers on `num_processes` processes; None takes the local ones as they are.

    The batch sizes are upper limits: of prompts in a slice and of pairs in a minibatch. Raises
    UserError where a global number does not divide by the processes.
    """
    _require_positive("sample.batch_size", sample_batch_size)
    _require_positive("sample.global_batch_size", sample_global_batch_size)
    _require_positive("train.batch_size", train_batch_size)
    _require_positive("train.global_batch_size", train_global_batch_size)
    _require_positive("train.gradient_accumulation_steps", gradient_accumulation_steps)
    if train_global_batch_size is not None and gradient_accumulation_steps is not None:
        raise UserError(
            f"train.gradient_accumulation_steps: it follows from train.global_batch_size="
            f"{train_global_batch_size}; set that to None to choose the accumulation yourself"
        )
    _require_divisible(
        num_processes,
        {
            "sample.global_batch_size": sample_global_batch_size,
            "train.global_batch_size": train_global_batch_size,
        },
    )

    slices, slice_size = 1, sample_batch_size
    if sample_global_batch_size is not None:
        slices, slice_size = _split(sample_global_batch_size // num_processes, sample_batch_size)

    accumulation_steps, minibatch_size = gradient_accumulation_steps or 1, train_batch_size
    if train_global_batch_size is not None:
        accumulation_steps, minibatch_size = _split(
            train_global_batch_size // num_processes, train_batch_size
        )

    return BatchPlan(
        num_processes=num_processes,
        prompts_per_rollout=slices * slice_size * num_processes,
        slices=slices,
        slice_size=slice_size,
        minibatch_size=minibatch_size,
        accumulation_steps=accumulation_steps,
    )


def plan_updates(config: ConfigDict, num_processes: int) -> UpdatePlan:
    """The sizes that `config` makes on `num_processes` processes; raises what `fit_update` does."""
    return fit_update(num_processes, config.train.batch_size, config.train.global_batch_size)


def fit_update(num_processes: int, batch_size: int, global_batch_size: int | None) -> UpdatePlan:
    """Keeps the global number of pairs on `num_processes` processes; None: one minibatch on each.

    `batch_size` is an upper limit. Raises UserError where the global number does not divide by the
    processes.
    """
    _require_positive("train.batch_size", batch_size)
    _require_positive("train.global_batch_size", global_batch_size)
    _require_divisible(num_processes, {"train.global_batch_size": global_batch_size})
    accumulation_steps, minibatch_size = 1, batch_size
    if global_batch_size is not None:
        accumulation_steps, minibatch_size = _split(global_batch_size // num_processes, batch_size)
    return UpdatePlan(num_processes, minibatch_size, accumulation_steps)


def _split(total: int, limit: int) -> tuple[int, int]:
    """`total` as (number of parts, size of a part), parts equal and as large as `limit` allows."""
    size = max(n for n in range(1, min(total, limit) + 1) if total % n == 0)
    return total // size, size


def _require_positive(key: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"{key} = {value}: must be at least 1")


def _require_divisible(num_processes: int, totals: dict[str, int | None]) -> None:
    """Raises a UserError that names the counts that work and the keys that lift the constraint."""
    totals = {key: total for key, total in totals.items() if total is not None}
    broken = {key: total for key, total in totals.items() if total % num_processes}
    if not broken:
        return
    working = [
        str(n)
        for n in range(1, MAX_PROCESSES + 1)
        if all(total % n == 0 for total in totals.values())
    ]
    numbers = " and ".join(f"{key} = {total}" for key, total in broken.items())
    lift = " ".join(f"--config.{key}=None" for key in broken)
    raise UserError(
        f"{numbers} cannot be shared equally by {num_processes} processes; "
        f"process counts that work: {', '.join(working)}; without the constraint: {lift}"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
