"""What of a run survives on disk: checkpoints and the final LoRA, in safe formats alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.launch.batch_plan import BatchPlan
from spo.lora_io.diffusers_file import LORA_FILE, parameter_names, save_lora
from spo.method.learner import Learner
from spo.method.position import (
    Position,
    RolloutInProgress,
    gradient_tensors,
    gradients_of,
    load_share,
    rollout_of,
)
from spo.models.optimizers import optimizer_tensors, restore_optimizer
from spo.run.checkpoint_folder import OPTIMIZER, new_checkpoint, read_state, reading, write_state


@dataclass(frozen=True)
class Progress:
    """How far a run has come, as one of its processes sees it."""

    position: Position
    rollout: RolloutInProgress | None = None  # None: between rollouts

    def name(self) -> str:
        """The name of the checkpoint that is saved here; `checkpoints` sorts them by progress."""
        name = f"epoch_{self.position.epochs:04d}"
        if self.position.prompts or self.rollout:
            name += f"_rollout_{self.position.rollouts:06d}"
        return name + (f"_pair_{self.rollout.used:06d}" if self.rollout else "")


def save_networks(folder: Path, learner: Learner, metadata: dict[str, str]) -> None:
    """Write the policy LoRA into `folder`, and the EMA LoRA, if any, into `folder`/ema."""
    header = metadata | {"step": str(learner.updates)}
    save_lora(folder / LORA_FILE, learner.lora, learner.lora.parameters, header)
    if learner.ema is not None:
        (folder / "ema").mkdir(exist_ok=True)
        save_lora(folder / "ema" / LORA_FILE, learner.lora, learner.ema, header)


def own_tensors(learner: Learner, progress: Progress) -> dict[str, Tensor]:
    """What each process has for itself: the gradients it accumulated, and its pairs."""
    pairs = progress.rollout.tensors() if progress.rollout else {}
    return gradient_tensors(learner.gradients()) | pairs


def save_checkpoint(
    run_dir: Path,
    learner: Learner,
    progress: Progress,
    shares: Iterable[Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    metadata: dict[str, str],
    limit: int,
) -> None:
    """Write a checkpoint, then delete the oldest beyond `limit` (0 keeps all).

    `shares` are the `own_tensors` of one process after the other, written as they come; `facts` are
    those that `resume.compare` knows.
    """
    state = {
        "position": asdict(progress.position),
        "rollout": progress.rollout and progress.rollout.numbers(),
        "accumulated": learner.minibatches % learner.settings.accumulation_steps,
        "updates": learner.updates,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "scaler": learner.scaler.state_dict(),
        **facts,
    }
    with new_checkpoint(run_dir, progress.name(), limit) as folder:
        save_networks(folder, learner, metadata)
        tensors = optimizer_tensors(learner.optimizer, learner.lora.parameters)
        save_file(tensors, folder / OPTIMIZER)
        for rank, share in enumerate(shares):
            save_file(dict(share), folder / _process_file(rank))
        write_state(folder, state)


def load_checkpoint(folder: Path, learner: Learner, plan: BatchPlan, rank: int) -> Progress:
    """Put `learner` into the state that was saved; UserError where a file is missing or unfit.

    Another number of processes, or other minibatches, deal out anew what was not used yet.
    """
    state = read_state(folder)
    with reading(folder):
        learner.lora.assign(parameter_names(load_file(folder / LORA_FILE)))
        if learner.ema is not None:
            ema = parameter_names(load_file(folder / "ema" / LORA_FILE))
            for name, tensor in learner.ema.items():
                tensor.copy_(ema[name])
        restore_optimizer(learner.optimizer, learner.lora.parameters, load_file(folder / OPTIMIZER))
        files = [folder / _process_file(r) for r in range(state["plan"]["num_processes"])]
        share, left = load_share(files, rank, plan.num_processes)
        if state["scaler"]:  # empty where the checkpoint is not of fp16
            learner.scaler.load_state_dict(state["scaler"])
        _restore_gradients(learner, gradients_of(share), state)
        learner.updates = state["updates"]
        learner.skipped_in_a_row = state["skipped_in_a_row"]
        position, rollout = Position(**state["position"]), None
        if state["rollout"]:
            numbers = state["rollout"] | {"left_over": state["rollout"]["left_over"] + left}
            rollout = rollout_of(share, numbers, learner.backbone.device)
        return Progress(position, rollout)


def _restore_gradients(learner: Learner, gradients: Mapping[str, Tensor], state: dict) -> None:
    """Go on with an accumulated gradient; as much of an update as now can be made of minibatches."""
    then, now = state["plan"]["accumulation_steps"], learner.settings.accumulation_steps
    learner.minibatches = state["accumulated"] * now // then
    if learner.minibatches == 0:
        return
    share_of_update = (learner.minibatches * then) / (state["accumulated"] * now)
    scale = learner.scaler.get_scale() / state["scaler"].get("scale", 1.0) * share_of_update
    for name, gradient in gradients.items():
        parameter = learner.lora.parameters[name]
        parameter.grad = (gradient * scale).to(parameter.device)


def _process_file(rank: int) -> str:
    return f"process_{rank:04d}.safetensors"
