"""Gradients and updates of the SPM."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from spo.preference.loss import (
    PairFeatures,
    in_batch_losses,
    learning_rate_factor,
    pair_losses,
)
from spo.preference.model import PairScorer, autocast
from spo.scorers.step_aware_clip import StepAwareCLIP


@dataclass(frozen=True)
class TrainingPairs:
    """A minibatch of n pairs, ready for the SPM, on its device."""

    pixels: Tensor  # (n, 2, 3, S, S) normalised
    timesteps: Tensor  # (n,)
    input_ids: Tensor  # (n, L)
    labels: Tensor  # (n,) P(image 0 wins)
    weights: Tensor  # (n,) over all minibatches and processes of an update they sum to 1


@dataclass(frozen=True)
class Judged:
    """What the SPM made of a minibatch of n pairs; without gradients."""

    losses: Tensor  # (n,) not weighted
    scores: Tensor  # (n, 2)


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    grad_norm: Tensor  # () before clipping
    skipped: bool  # the fp16 gradients overflowed and the weights stayed

    def is_finite(self) -> bool:
        """Whether the gradient, where it was used, is a finite number."""
        return self.skipped or bool(self.grad_norm.isfinite())


@dataclass(frozen=True)
class UpdateSettings:
    """How gradients become updates; `config.train` explains each."""

    learning_rate: float
    warmup_steps: int
    total_steps: int
    max_grad_norm: float | None
    in_batch_negatives: bool


class PreferenceLearner:
    """The SPM, the optimizer that moves it, and how many steps that has made.

    `scorer` is a PairScorer of `spm`, or its DDP wrapper.
    """

    def __init__(
        self,
        spm: StepAwareCLIP,
        scorer: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: UpdateSettings,
        device: torch.device,
        dtype: torch.dtype,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.spm, self.scorer, self.optimizer = spm, scorer, optimizer
        self.settings, self.device, self.dtype = settings, device, dtype
        self.processes, self.rank = processes, rank
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.step = 0  # optimizer steps planned so far, those that were skipped included
        self.skipped_in_a_row = 0  # of them, as their fp16 gradients overflowed

    def learning_rate(self) -> float:
        """That of the next optimizer step."""
        settings = self.settings
        return settings.learning_rate * learning_rate_factor(
            self.step, settings.warmup_steps, settings.total_steps
        )

    def backward(self, pairs: TrainingPairs, last: bool) -> Judged:
        """Add the gradients of `pairs`; DDP averages them in the `last` minibatch of an update."""
        local = not last and hasattr(self.scorer, "no_sync")
        with self.scorer.no_sync() if local else contextlib.nullcontext():
            with autocast(self.device, self.dtype):
                features = self.scorer(pairs.pixels, pairs.timesteps, pairs.input_ids)
            losses = self._losses(features, pairs)
            # The weights add up to 1 over all processes, whose gradients DDP averages.
            loss = (pairs.weights * losses).sum() * self.processes
            self.scaler.scale(loss).backward()
        return Judged(losses.detach(), features.scores.detach())

    @torch.no_grad()
    def features(self, pixels: Tensor, timesteps: Tensor, input_ids: Tensor) -> PairFeatures:
        """What the SPM makes of pairs, shaped as TrainingPairs' fields."""
        with autocast(self.device, self.dtype):
            return PairScorer(self.spm)(pixels, timesteps, input_ids)

    def _losses(self, features: PairFeatures, pairs: TrainingPairs) -> Tensor:
        if not self.settings.in_batch_negatives:
            return pair_losses(features.scores, pairs.labels)
        everyone, valid = features, pairs.weights > 0
        if self.processes > 1:
            everyone, valid = self._gather(features, valid)
        first = self.rank * len(pairs.labels)
        return in_batch_losses(features, everyone, valid, first, pairs.labels)

    def _gather(self, features: PairFeatures, valid: Tensor) -> tuple[PairFeatures, Tensor]:
        """The minibatch of all processes; gradients flow back to the process of each row."""
        width = features.text.shape[1]
        # As one matrix: torch mixes up the gradients of gathered tensors that are not contiguous.
        rows = torch.cat([features.image.flatten(1), features.text], dim=1)
        rows = torch.cat(all_gather(rows))
        everyone = PairFeatures(
            image=rows[:, : 2 * width].unflatten(1, (2, width)),
            text=rows[:, 2 * width :],
            scale=features.scale,
        )
        gathered = [torch.empty_like(valid) for _ in range(self.processes)]
        dist.all_gather(gathered, valid)
        return everyone, torch.cat(gathered)

    def update(self) -> Update:
        """Move the weights by the gradients so far."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(
            self.spm.parameters(), float("inf") if limit is None else limit
        )
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # The scaler backs off where gradients overflowed.
        skipped = self.scaler.get_scale() < scale
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return Update(norm, skipped)

    def skip_update(self) -> None:
        """Count an optimizer step that had nothing to learn from."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
