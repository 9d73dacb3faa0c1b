"""The SPM in training: features of pairs, the gradients of its loss, and updates."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from spo.command_line.values import Checked, not_negative, positive, require_whole, whole
from spo.errors import UserError
from spo.models.optimizers import OptimizerSettings, Update, apply_gradients
from spo.preference.loss import (
    PairFeatures,
    in_batch_losses,
    learning_rate_factor,
    pair_losses,
)
from spo.scorers.clip import text_features
from spo.scorers.step_aware_clip import StepAwareCLIP


@dataclass(frozen=True)
class TrainSettings(Checked, section="train"):
    """How an SPM is trained; `config.train` explains each field of its name."""

    max_train_steps: int  # of the config itself
    optimizer: OptimizerSettings
    predict_batch_size: int = whole()
    gradient_checkpointing: bool
    guidance_scale: float = not_negative()
    in_batch_negatives: bool
    warmup_steps: int = whole(0)
    max_grad_norm: float | None = positive()
    max_skipped_updates: int = whole()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("max_train_steps", self.max_train_steps)
        if self.warmup_steps >= self.max_train_steps:
            raise UserError(
                f"train.warmup_steps: {self.warmup_steps} must be below max_train_steps = "
                f"{self.max_train_steps}."
            )

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of optimizer step `step` (from 0)."""
        factor = learning_rate_factor(step, self.warmup_steps, self.max_train_steps)
        return self.optimizer.learning_rate * factor


@dataclass(frozen=True)
class TrainingPairs:
    """A minibatch of n pairs, ready for the SPM, on its device."""

    pixels: Tensor  # (n, 2, 3, S, S) normalised
    timesteps: Tensor  # (n,)
    input_ids: Tensor  # (n, L)
    labels: Tensor  # (n,) P(image 0 wins)
    weights: Tensor  # (n,) which sum to 1 over all minibatches and processes of an update


@dataclass(frozen=True)
class ScoredPairs:
    """Losses and scores of TrainingPairs, without gradients."""

    timesteps: Tensor  # (n,)
    labels: Tensor  # (n,)
    weights: Tensor  # (n,)
    losses: Tensor  # (n,) not weighted
    scores: Tensor  # (n, 2)


class PairScorer(nn.Module):
    """Computes the features of pairs in one forward pass, for DDP."""

    def __init__(self, spm: StepAwareCLIP) -> None:
        super().__init__()
        self.spm = spm

    def forward(self, pixels: Tensor, timesteps: Tensor, input_ids: Tensor) -> PairFeatures:
        """Returns fp32 features; the arguments have the shapes of TrainingPairs' fields."""
        image = self.spm.image_features(pixels.flatten(0, 1), timesteps.repeat_interleave(2))
        return PairFeatures(
            image=image.float().unflatten(0, (-1, 2)),
            text=text_features(self.spm.model, input_ids).float(),
            scale=self.spm.model.logit_scale.exp(),
        )


class PreferenceLearner:
    """The SPM, its optimizer, and the number of steps made.

    `scorer` is a PairScorer of `spm`, or its DDP wrapper; `dtype` is that of mixed precision.
    """

    def __init__(
        self,
        spm: StepAwareCLIP,
        scorer: nn.Module,
        settings: TrainSettings,
        device: torch.device,
        dtype: torch.dtype,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        self.spm, self.scorer = spm, scorer
        self.settings, self.device, self.dtype = settings, device, dtype
        self.processes, self.rank = processes, rank
        self.optimizer = settings.optimizer.make(spm.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.step = 0  # optimizer steps so far, including skipped ones
        self.skipped_in_a_row = 0  # the latest of them, skipped as their fp16 gradients overflowed

    def backward(self, pairs: TrainingPairs, last: bool) -> ScoredPairs:
        """Adds the gradients of `pairs`; DDP averages them in the `last` minibatch of an update."""
        local = not last and hasattr(self.scorer, "no_sync")
        with self.scorer.no_sync() if local else contextlib.nullcontext():
            with self._mixed_precision():
                features = self.scorer(pairs.pixels, pairs.timesteps, pairs.input_ids)
            losses = self._losses(features, pairs)
            # The weights sum to 1 over all processes, whose gradients DDP averages.
            loss = (pairs.weights * losses).sum() * self.processes
            self.scaler.scale(loss).backward()
        losses, scores = losses.detach(), features.scores.detach()
        return ScoredPairs(pairs.timesteps, pairs.labels, pairs.weights, losses, scores)

    @torch.no_grad()
    def features(self, pixels: Tensor, timesteps: Tensor, input_ids: Tensor) -> PairFeatures:
        """Returns features of pairs; the arguments have the shapes of TrainingPairs' fields."""
        with self._mixed_precision():
            return PairScorer(self.spm)(pixels, timesteps, input_ids)

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _losses(self, features: PairFeatures, pairs: TrainingPairs) -> Tensor:
        if not self.settings.in_batch_negatives:
            return pair_losses(features.scores, pairs.labels)
        everyone, valid = features, pairs.weights > 0
        if self.processes > 1:
            everyone, valid = self._gather(features, valid)
        first = self.rank * len(pairs.labels)
        return in_batch_losses(features, everyone, valid, first, pairs.labels)

    def _gather(self, features: PairFeatures, valid: Tensor) -> tuple[PairFeatures, Tensor]:
        """Returns all processes' rows; gradients flow back to the process of each row."""
        # As one matrix: torch mixes up the gradients of gathered tensors that are not contiguous.
        rows = torch.cat([features.image.flatten(1), features.text, valid[:, None]], dim=1)
        image_0, image_1, text, valid = torch.cat(all_gather(rows)).split(
            [*[features.text.shape[1]] * 3, 1], dim=1
        )
        image = torch.stack([image_0, image_1], dim=1)
        return PairFeatures(image, text, features.scale), valid.squeeze(1) > 0

    def update(self) -> Update:
        """Makes an optimizer step with the gradients added since the last one."""
        (group,) = self.optimizer.param_groups
        group["lr"] = self.settings.learning_rate(self.step)
        parameters, limit = self.spm.parameters(), self.settings.max_grad_norm
        update = apply_gradients(self.optimizer, self.scaler, parameters, limit)
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.skipped else 0
        return update

    def skip_update(self) -> None:
        """Counts an optimizer step that had nothing to learn from."""
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
