"""How far a run has come: its position, and the rollout that it is training on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spo.types import Conditioning, PreferencePairs


@dataclass(frozen=True)
class Position:
    """What of a run is complete; a rollout is, once all its pairs were trained on."""

    epochs: int = 0
    rollouts: int = 0  # in all epochs
    rollouts_in_epoch: int = 0  # of the epoch that is not complete
    prompts: int = 0  # of that epoch, used by these rollouts

    def after(self, prompts: int, prompts_per_epoch: int) -> Position:
        """The position after one more rollout of so many prompts."""
        done = self.prompts + prompts
        if done == prompts_per_epoch:
            return Position(self.epochs + 1, self.rollouts + 1)
        return Position(self.epochs, self.rollouts + 1, self.rollouts_in_epoch + 1, done)

    def is_checkpoint_due(self, every_rollouts: int, every_epochs: int, num_epochs: int) -> bool:
        """Whether a checkpoint is saved here; `every_rollouts` 0 saves none within an epoch."""
        if every_rollouts and self.rollouts % every_rollouts == 0:
            return True
        is_last = self.epochs == num_epochs
        return self.prompts == 0 and (is_last or self.epochs % every_epochs == 0)


@dataclass(frozen=True)
class RolloutInProgress:
    """A rollout between two of its minibatches, as one process sees it."""

    pairs: PreferencePairs  # those of this process that are left, in training order
    steps: tuple[Tensor, ...]  # metrics.step_row of each minibatch so far
    sums: Mapping[str, float]  # metrics.rollout_sums, over all processes
    prompts: int  # that were rolled out, by all processes
    used: int  # pairs trained on so far, by all processes
    left_over: int  # pairs that could not be dealt out evenly
    seconds_rollout: float
    seconds_train: float  # so far

    def numbers(self) -> dict[str, Any]:
        """Everything but the tensors, the same on every process."""
        names = [f.name for f in fields(self) if f.name not in ("pairs", "steps")]
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of this process, by name."""
        rows = torch.stack(self.steps) if self.steps else self.pairs.latents.new_zeros(0, 0)
        conditioning = vars(self.pairs.conditioning).items()
        return {
            "steps": rows,
            **{f"{_PAIRS}{name}": tensor for name, tensor in self.pairs.tensors().items()},
            **{f"{_TEXT}{name}": tensor for name, tensor in conditioning if tensor is not None},
        }


_PAIRS, _TEXT, _GRADIENT = "pairs.", "conditioning.", "gradient:"


def gradient_tensors(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Accumulated gradients under the names that `load_share` knows."""
    return {f"{_GRADIENT}{name}": tensor for name, tensor in gradients.items()}


def gradients_of(share: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `gradient_tensors`, for whatever else is in `share`."""
    prefix = _GRADIENT
    return {n.removeprefix(prefix): t for n, t in share.items() if n.startswith(prefix)}


def rollout_of(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device
) -> RolloutInProgress:
    """The rollout that had these `tensors` and `numbers`."""

    def named(prefix: str) -> dict[str, Tensor]:
        found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        return {name: tensor.to(device) for name, tensor in found.items()}

    pairs = PreferencePairs(**named(_PAIRS), conditioning=Conditioning(**named(_TEXT)))
    steps = tuple(tensors["steps"].to(device).unbind())
    return RolloutInProgress(pairs=pairs, steps=steps, **numbers)


def load_share(files: Sequence[Path], rank: int, count: int) -> tuple[dict[str, Tensor], int]:
    """What process `rank` of `count` goes on with, of what each process had in a file of its own.

    The same processes go on with their own. Others deal the pairs out anew, in the order in which
    they were shuffled, and start from the mean of the accumulated gradients. Returns the tensors,
    and how many pairs can no longer be dealt out evenly. Holds one file at a time.
    """
    if len(files) == count:
        return _aligned(load_file(files[rank])), 0
    share: dict[str, Tensor] = {}
    places: list[Tensor] = []
    left = 0
    for source, file in enumerate(files):
        loaded = load_file(file)
        if "steps" in loaded:
            each = len(loaded[_PAIRS + "timesteps"])  # the same in every file
            left = each * len(files) % count
            place = torch.arange(each) * len(files) + source  # in the shuffled order
            mine = (place % count == rank) & (place < each * len(files) - left)
            places.append(place[mine])
        for name, tensor in loaded.items():
            if name.startswith(_GRADIENT) or name == "steps":
                share[name] = share.get(name, 0) + tensor / len(files)
            elif _has_rows(name):
                share[name] = torch.cat([*([share[name]] if name in share else []), tensor[mine]])
            else:
                share[name] = tensor
    if places:
        order = torch.argsort(torch.cat(places))
        share |= {name: share[name][order] for name in share if _has_rows(name)}
    return _aligned(share), left


def _has_rows(name: str) -> bool:
    """Whether a tensor has one row per pair."""
    return name.startswith((_PAIRS, f"{_TEXT}prompt_embeds", f"{_TEXT}pooled"))


def _aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory of torch's own: kernels may round otherwise where a file is mapped."""
    return {name: tensor.clone() for name, tensor in tensors.items()}
