"""A preference model in training: gradients of its loss, updates, checkpoints in safe formats only."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spo.atomic import replacing
from spo.command_line.values import (
    Checked,
    choice,
    not_negative,
    number,
    positive,
    require_whole,
    whole,
)
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
    """The settings of a preference model's training; `config.train` explains each field of its name."""

    max_train_steps: int  # of the config itself
    optimizer: OptimizerSettings
    predict_batch_size: int = whole()
    gradient_checkpointing: bool
    num_timesteps: int = number("a whole number from 1 to 1000", lambda v: 1 <= v <= 1000)
    guidance_scale: float = not_negative()
    warmup_steps: int = whole(0)
    warmup: str = choice("linear", "logarithmic")
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

        Linear warm-up, then linear decay to 0, as transformers' get_linear_schedule_with_warmup; or the
        logarithmic warm-up of DeepSpeed's WarmupDecayLR, log(step + 1) / log(warmup_steps).
        """
        if step < self.warmup_steps:
            factor = step / self.warmup_steps
            if self.warmup == "logarithmic":
                factor = math.log(step + 1) / math.log(max(2, self.warmup_steps))
        else:
            factor = (self.max_train_steps - step) / (self.max_train_steps - self.warmup_steps)
        return self.optimizer.learning_rate * factor


@dataclass(frozen=True)
class TrainingPairs:
    """A minibatch of n pairs, ready for the preference model, on its device."""

    images: Tensor  # (n, 2, ...) as the model sees them: normalised pixels, or noisy latents
    timesteps: Tensor  # (n,)
    input_ids: tuple[Tensor, ...]  # (n, L) for each text encoder
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

    file: ClassVar[str]  # of a checkpoint, with what learns
    exported: ClassVar[str]  # file or folder of a run

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def learned(self) -> dict[str, nn.Parameter]:
        """Returns the parameters that learn, by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def forward(self, images: Tensor, timesteps: Tensor, *input_ids: Tensor) -> Tensor:
        """Returns fp32 scores (n, 2); the arguments have the shapes of TrainingPairs' fields."""
        raise NotImplementedError

    def export(self, run_dir: Path) -> None:
        """Writes the model in its published form into a run directory."""
        raise NotImplementedError


class SPMPairScorer(PairScorer):
    """Scores the images of pairs by an SPM."""

    file = exported = SPM_FILE
    model: StepAwareCLIP

    def forward(self, pixels: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Returns fp32 scores (n, 2) of normalised pixels (n, 2, 3, S, S)."""
        spm = self.model
        image = spm.image_features(pixels.flatten(0, 1), timesteps.repeat_interleave(2))
        text = text_features(spm.model, input_ids)
        cosines = (image.unflatten(0, (-1, 2)) * text[:, None]).sum(dim=-1)
        return spm.model.logit_scale.exp() * cosines

    def export(self, run_dir: Path) -> None:
        """Writes the state dict that `preference.checkpoint` takes."""
        save_weights(run_dir / self.file, self.model.state_dict())


@dataclass(eq=False)
class PreferenceLearner:
    """A preference model, its optimizer, and the number of steps made.

    `parallel` is `scorer` or its DDP wrapper; `dtype` is that of mixed precision.
    """

    scorer: PairScorer
    parallel: nn.Module
    settings: TrainSettings
    device: torch.device
    dtype: torch.dtype
    processes: int = 1

    def __post_init__(self) -> None:
        self.optimizer = self.settings.optimizer.make(self.scorer.learned().values())
        is_fp16 = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=is_fp16)
        self.step = 0  # optimizer steps so far, including skipped ones
        self.skipped_in_a_row = 0  # the latest of them, skipped as their fp16 gradients overflowed

    def backward(self, pairs: TrainingPairs, last: bool) -> tuple[Tensor, Tensor]:
        """Adds the gradients of `pairs`; DDP averages them in the `last` minibatch of an update.

        Returns the pairs' losses (n,), not weighted, and scores (n, 2), without gradients.
        """
        local = not last and hasattr(self.parallel, "no_sync")
        with self.parallel.no_sync() if local else contextlib.nullcontext():
            with self._mixed_precision():
                scores = self.parallel(pairs.images, pairs.timesteps, *pairs.input_ids)
            losses = pair_losses(scores, pairs.labels)
            # The weights sum to 1 over all processes, whose gradients DDP averages.
            loss = (pairs.weights * losses).sum() * self.processes
            self.scaler.scale(loss).backward()
        return losses.detach(), scores.detach()

    @torch.no_grad()
    def scores(self, images: Tensor, timesteps: Tensor, *input_ids: Tensor) -> Tensor:
        """Returns scores (n, 2); the arguments have the shapes of TrainingPairs' fields."""
        with self._mixed_precision():
            return self.scorer(images, timesteps, *input_ids)

    def _mixed_precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def update(self) -> Update:
        """Makes an optimizer step with the gradients added since the last one."""
        (group,) = self.optimizer.param_groups
        group["lr"] = self.settings.learning_rate(self.step)
        parameters, limit = self.scorer.learned().values(), self.settings.max_grad_norm
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
        tensors = optimizer_tensors(self.optimizer, self.scorer.learned())
        self.save_weights(folder / self.scorer.file)
        save_file(tensors, folder / OPTIMIZER)
        write_state(folder, state)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores a checkpoint and returns its state; UserError if a file is missing or unfit."""
        state = read_state(folder)
        with reading(folder):
            self.load_weights(folder / self.scorer.file)
            tensors = load_file(folder / OPTIMIZER)
            restore_optimizer(self.optimizer, self.scorer.learned(), tensors)
            if state["scaler"]:  # empty unless the checkpoint is of fp16
                self.scaler.load_state_dict(state["scaler"])
            (group,) = self.optimizer.param_groups
            group["lr"] = state["learning_rate"]
            self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        return state

    def save_weights(self, path: Path) -> None:
        """Writes what learns."""
        save_weights(path, self.scorer.learned())

    def load_weights(self, path: Path) -> None:
        """Restores what learns; raises one of READ_ERRORS unless the file has all of it alone."""
        weights, own = load_file(path), self.scorer.learned()
        if weights.keys() != own.keys():
            raise ValueError(
                f"{path.name} holds other parameters: {min(weights.keys() ^ own.keys())}"
            )
        self.scorer.model.load_state_dict(weights, strict=False)


def check_state(state: Mapping[str, Any]) -> None:
    """Raises one of READ_ERRORS if no run can have saved these numbers: somebody edited them."""
    check_numbers(state["left_out"] | {name: state[name] for name in ("step", "skipped_in_a_row")})
    check_numbers(state["plan"], least=1)
    floats = {"learning_rate": state["learning_rate"], **state["scaler"]}
    check_numbers(floats, kinds=(int, float))
    check_numbers(state.get("best", {}), kinds=(int, float))
    check_numbers(state["totals"], least=-(2**63), kinds=(int, float))


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as a safetensors file."""
    weights = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
