"""The progress of a run: its position, and the rollout whose pairs it is training on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo.method.metrics import Metrics, summary
from spo.seeding import derive_seed
from spo.types import PreferencePairs

if TYPE_CHECKING:
    from spo.method.learner import Step


@dataclass(frozen=True)
class Position:
    """The progress of a run. A rollout counts once all its pairs have been trained on."""

    epochs: int = 0
    rollouts: int = 0  # of all epochs
    rollouts_in_epoch: int = 0  # of the epoch that has begun
    prompts: int = 0  # of that epoch, used by these rollouts

    def after(self, prompts: int, prompts_per_epoch: int) -> Position:
        """Returns the position after one more rollout of that many prompts."""
        done = self.prompts + prompts
        if done == prompts_per_epoch:
            return Position(self.epochs + 1, self.rollouts + 1)
        return Position(self.epochs, self.rollouts + 1, self.rollouts_in_epoch + 1, done)

    def is_checkpoint_due(self, every_rollouts: int, every_epochs: int, num_epochs: int) -> bool:
        """Tells if a checkpoint is saved here; `every_rollouts` 0 saves none within an epoch."""
        if every_rollouts and self.rollouts % every_rollouts == 0:
            return True
        is_last = self.epochs == num_epochs
        return self.prompts == 0 and (is_last or self.epochs % every_epochs == 0)


@dataclass(frozen=True)
class RolloutInProgress:
    """A rollout between two of its minibatches, as one process sees it."""

    pairs: PreferencePairs  # this process's pairs that are left, in training order
    metrics: Metrics  # of this process, so far
    prompts: int  # rolled out by all processes
    left_over: int  # pairs that could not be dealt out evenly
    seconds_rollout: float
    seconds_train: float = 0.0  # so far
    used: int = 0  # pairs trained on so far, by all processes
    minibatches: int = 0  # of each process, so far
    updates: int = 0
    skipped_updates: int = 0

    def after(self, minibatch: PreferencePairs, step: Step, processes: int) -> RolloutInProgress:
        """Returns the rollout after training on its next minibatch."""
        step.note(self.metrics)
        return replace(
            self,
            pairs=self.pairs.select(slice(len(minibatch), None)),
            used=self.used + len(minibatch) * processes,
            minibatches=self.minibatches + 1,
            updates=self.updates + step.is_update,
            skipped_updates=self.skipped_updates
            + (step.update is not None and step.update.skipped),
        )

    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Returns the numbers of metrics.jsonl; `sums` are the metrics of all processes."""
        measured = {"loss": None, "grad_norm": None, "kl_at": {}} | summary(sums)
        images = measured.pop("images")
        return {
            **measured,
            "minibatches": self.minibatches,
            "updates": self.updates,
            "skipped_updates": self.skipped_updates,
            "pairs_left_over": self.left_over,
            "seconds_rollout": self.seconds_rollout,
            "seconds_train": self.seconds_train,
            "images_per_second": images / self.seconds_rollout,
        }

    def numbers(self) -> dict[str, Any]:
        """Returns the fields that are the same on every process."""
        names = [f.name for f in fields(self) if f.name not in ("pairs", "metrics")]
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of this process, by name."""
        conditioning = vars(self.pairs.conditioning).items()
        return {
            **{METRICS + name: value for name, value in self.metrics.sums.items()},
            **{PAIRS + name: tensor for name, tensor in self.pairs.tensors().items()},
            **{TEXT + name: tensor for name, tensor in conditioning if tensor is not None},
        }


# What begins the names of `RolloutInProgress.tensors`.
PAIRS, TEXT, METRICS = "pairs.", "conditioning.", "metrics."


@dataclass(frozen=True)
class TrainingState:
    """The progress of a run, as one of its processes sees it."""

    position: Position
    rollout: RolloutInProgress | None = None  # None: between rollouts

    @property
    def inside_epoch(self) -> bool:
        """True if an epoch has begun."""
        return bool(self.position.prompts or self.rollout)

    def name(self) -> str:
        """Returns the name of a checkpoint saved here; names sort by progress."""
        name = f"epoch_{self.position.epochs:04d}"
        if self.inside_epoch:
            name += f"_rollout_{self.position.rollouts:06d}"
        return name + (f"_pair_{self.rollout.used:06d}" if self.rollout else "")


def epoch_order(num_prompts: int, seed: int, epoch: int) -> list[int]:
    """Returns the shuffled order of the prompts in an epoch."""
    generator = torch.Generator().manual_seed(derive_seed("epoch_order", seed, epoch))
    return torch.randperm(num_prompts, generator=generator).tolist()


def chunks_left(order: Sequence[int], state: TrainingState, size: int) -> list[Sequence[int]]:
    """Returns the prompts of each rollout that an epoch still needs, `size` prompts each.

    `order` are all prompts of the epoch. A rollout in progress is the first, with its own size.
    """
    start = state.position.prompts
    first = start + (state.rollout.prompts if state.rollout else size)
    bounds = [start, *range(first, len(order), size), len(order)]
    return [order[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
