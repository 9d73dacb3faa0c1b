"""The SPM in training: the gradients of its loss, updates, and checkpoints in safe formats only."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.atomic import replacing
from spo.command_line.values import Checked, not_negative, positive, require_whole, whole
from spo.errors import UserError
from spo.models.optimizers import (
    OptimizerSettings,
    Update,
    apply_gradients,
    optimizer_tensors,
    restore_optimizer,
)
from spo.run.checkpoint_folder import OPTIMIZER, check_numbers, read_state, reading, write_state
from spo.run.folder import SPM_FILE
from spo.scorers.clip import text_features
from spo.scorers.step_aware_clip import StepAwareCLIP


@dataclass(frozen=True)
class TrainSettings(Checked, section="train"):
    """The settings of an SPM's training; `config.train` explains each field of its name."""

    max_train_steps: int  # of the config itself
    optimizer: OptimizerSettings
    predict_batch_size: int = whole()
    gradient_checkpointing: bool
    guidance_scale: float = not_negative()
    warmup_steps: int = whole(0)
    max_grad_norm: float | None = positive()
    max_skipped_updates: int = whole()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("max_train_steps", self.max_train_steps)
        if self.warmup_steps >= self.max_train_steps:
            below = f"must be below max_train_steps = {self.max_train_steps}."
            raise UserError(f"train.warmup_steps: {self.warmup_steps} {below}")

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of optimizer step `step` (from 0).

        Linear warm-up, then linear decay to 0, as transformers' get_linear_schedule_with_warmup.
        """
        if step < self.warmup_steps:
            factor = step / self.warmup_steps
        else:
            factor = (self.max_train_steps - step) / (self.max_train_steps - self.warmup_steps)
        return self.optimizer.learning_rate * factor


@dataclass(frozen=True)
class TrainingPairs:
    """A minibatch of n pairs, ready for the SPM, on its device."""

    pixels: Tensor  # (n, 2, 3, S, S) normalised
    timesteps: Tensor  # (n,)
    input_ids: Tensor  # (n, L)
    labels: Tensor  # (n,) P(image 0 wins)
    weights: Tensor  # (n,) which sum to 1 over all minibatches and processes of an update


def pair_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) cross-entropies of softmax(scores), (n, 2), and labels (n,), P(image 0 wins).

    PickScore's loss (arXiv 2305.01569): for a tie log 2 is subtracted, so that a perfect tie costs 0.
    """
    targets = torch.stack([labels, 1 - labels], dim=-1)
    tie_entropy = (labels == 0.5) * math.log(2)
    return -(targets * scores.log_softmax(dim=-1)).sum(dim=-1) - tie_entropy


class PairScorer(nn.Module):
    """Scores both images of each pair in one forward pass, for DDP."""

    def __init__(self, spm: StepAwareCLIP) -> None:
        super().__init__()
        self.spm = spm

    def forward(self, pixels: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Returns fp32 scores (n, 2); the arguments have the shapes of TrainingPairs' fields."""
        image = self.spm.image_features(pixels.flatten(0, 1), timesteps.repeat_interleave(2))
        text = text_features(self.spm.model, input_ids).float()
        # In fp32, whatever the precision of the features.
        cosines = (image.float().unflatten(0, (-1, 2)) * text[:, None]).sum(dim=-1)
        return self.spm.model.logit_scale.exp() * cosines


@dataclass(eq=False)
class PreferenceLearner:
    """The SPM, its optimizer, and the number of steps made.

    `scorer` is a PairScorer of `spm`, or its DDP wrapper; `dtype` is that of mixed precision.
    """

    spm: StepAwareCLIP
    scorer: nn.Module
    settings: TrainSettings
    device: torch.device
    dtype: torch.dtype
    processes: int = 1

    def __post_init__(self) -> None:
        self.optimizer = self.settings.optimizer.make(self.spm.parameters())
        is_fp16 = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_fp16)
        self.step = 0  # optimizer steps so far, including skipped ones
        self.skipped_in_a_row = 0  # the latest of them, skipped as their fp16 gradients overflowed

    def backward(self, pairs: TrainingPairs, last: bool) -> tuple[Tensor, Tensor]:
        """Adds the gradients of `pairs`; DDP averages them in the `last` minibatch of an update.

        Returns the pairs' losses (n,), not weighted, and scores (n, 2), without gradients.
        """
        local = not last and hasattr(self.scorer, "no_sync")
        with self.scorer.no_sync() if local else contextlib.nullcontext():
            with self._mixed_precision():
                scores = self.scorer(pairs.pixels, pairs.timesteps, pairs.input_ids)
            losses = pair_losses(scores, pairs.labels)
            # The weights sum to 1 over all processes, whose gradients DDP averages.
            loss = (pairs.weights * losses).sum() * self.processes
            self.scaler.scale(loss).backward()
        return losses.detach(), scores.detach()

    @torch.no_grad()
    def scores(self, pixels: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Returns scores (n, 2); the arguments have the shapes of TrainingPairs' fields."""
        with self._mixed_precision():
            return PairScorer(self.spm)(pixels, timesteps, input_ids)

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def update(self) -> Update:
        """Makes an optimizer step with the gradients added since the last one."""
        (group,) = self.optimizer.param_groups
        group["lr"] = self.settings.learning_rate(self.step)
        parameters, limit = self.spm.parameters(), self.settings.max_grad_norm
        update = apply_gradients(self.optimizer, self.scaler, parameters, limit)
        self.step += 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.skipped else 0
        return update

    def save(self, folder: Path, others: Mapping[str, Any]) -> None:
        """Writes the files of a checkpoint; `others` are entries of its state that `load` returns."""
        (group,) = self.optimizer.param_groups
        state = {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "learning_rate": group["lr"],  # of this step, whose line may be due
            "scaler": self.scaler.state_dict(),
            **others,
        }
        tensors = optimizer_tensors(self.optimizer, dict(self.spm.named_parameters()))
        save_spm(folder, self.spm)
        save_file(tensors, folder / OPTIMIZER)
        write_state(folder, state)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores a checkpoint and returns its state; UserError if a file is missing or unfit."""
        state = read_state(folder)
        with reading(folder):
            self.spm.load_state_dict(load_file(folder / SPM_FILE), strict=True)
            parameters = dict(self.spm.named_parameters())
            restore_optimizer(self.optimizer, parameters, load_file(folder / OPTIMIZER))
            if state["scaler"]:  # empty unless the checkpoint is of fp16
                self.scaler.load_state_dict(state["scaler"])
            (group,) = self.optimizer.param_groups
            group["lr"] = state["learning_rate"]
            self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        return state


def check_state(state: Mapping[str, Any]) -> None:
    """Raises one of READ_ERRORS if no run can have saved these numbers: somebody edited them."""
    check_numbers(state["left_out"] | {name: state[name] for name in ("step", "skipped_in_a_row")})
    check_numbers(state["plan"], least=1)
    floats = {"learning_rate": state["learning_rate"], **state["scaler"]}
    check_numbers(floats, kinds=(int, float))
    check_numbers(state["totals"], least=-(2**63), kinds=(int, float))


def save_spm(folder: Path, spm: StepAwareCLIP) -> None:
    """Writes the state dict that `preference.checkpoint` takes."""
    weights = {name: t.detach().cpu().contiguous() for name, t in spm.state_dict().items()}
    with replacing(folder / SPM_FILE) as path:
        save_file(weights, path, metadata={"format": "pt"})
