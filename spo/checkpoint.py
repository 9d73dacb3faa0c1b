"""What of a run survives on disk: checkpoints and the final LoRA, in safe formats alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spo.errors import UserError
from spo.hub import LOAD_ERRORS, first_line
from spo.learner import Learner
from spo.lora import FILE_NAME, parameter_names, save_lora

_STATE = "training_state"
_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    epochs: int  # completed
    rollouts: int  # completed, in all epochs


def save_networks(folder: Path, learner: Learner, metadata: dict[str, str]) -> None:
    """Write the policy LoRA into `folder`, and the EMA LoRA, if any, into `folder`/ema."""
    header = metadata | {"step": str(learner.updates)}
    folder.mkdir(parents=True, exist_ok=True)
    save_lora(folder / FILE_NAME, learner.lora, learner.lora.parameters, header)
    if learner.ema is not None:
        (folder / "ema").mkdir(exist_ok=True)
        save_lora(folder / "ema" / FILE_NAME, learner.lora, learner.ema, header)


def save_checkpoint(
    run_dir: Path,
    learner: Learner,
    gradients: Mapping[str, torch.Tensor],
    position: Position,
    metadata: dict[str, str],
    limit: int,
) -> None:
    """Write a checkpoint, then delete the oldest beyond `limit` (0 keeps all).

    `gradients` are those accumulated so far, averaged over all processes. The checkpoint appears
    under its name only when it is complete.
    """
    folder = run_dir / _FOLDER / f"epoch_{position.epochs:04d}"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_networks(partial, learner, metadata)
    save_file(_tensors(learner, gradients), partial / f"{_STATE}.safetensors")
    state = {
        "epochs": position.epochs,
        "rollouts": position.rollouts,
        "minibatches": learner.minibatches,
        "updates": learner.updates,
        "scaler": learner.scaler.state_dict(),
    }
    (partial / f"{_STATE}.json").write_text(json.dumps(state, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if limit:
        for old in checkpoints(run_dir)[:-limit]:
            shutil.rmtree(old)


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / _FOLDER).glob("epoch_*") if p.suffix != ".partial")


def load_checkpoint(folder: Path, learner: Learner) -> Position:
    """Put `learner` into the state that was saved; UserError where a file is missing or unfit."""
    try:
        state: dict[str, Any] = json.loads((folder / f"{_STATE}.json").read_text())
        learner.lora.assign(parameter_names(load_file(folder / FILE_NAME)))
        if learner.ema is not None:
            ema = parameter_names(load_file(folder / "ema" / FILE_NAME))
            for name, tensor in learner.ema.items():
                tensor.copy_(ema[name])
        _restore(learner, load_file(folder / f"{_STATE}.safetensors"))
        learner.minibatches, learner.updates = state["minibatches"], state["updates"]
        learner.scaler.load_state_dict(state["scaler"])
        return Position(state["epochs"], state["rollouts"])
    except (*LOAD_ERRORS, KeyError) as error:
        raise UserError(
            f"resume_from: {folder} is not a checkpoint of this config ({first_line(error)}); choose "
            "another checkpoint, or start anew."
        ) from error


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a checkpoint that can be resumed from."""
    return (folder / f"{_STATE}.json").is_file()


def _tensors(learner: Learner, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Optimizer state and gradients by kind and parameter name."""
    tensors = {f"gradient:{name}": tensor.contiguous() for name, tensor in gradients.items()}
    for name, parameter in learner.lora.parameters.items():
        for kind, value in learner.optimizer.state[parameter].items():
            tensors[f"optimizer.{kind}:{name}"] = torch.as_tensor(value).contiguous()
    return tensors


def _restore(learner: Learner, tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        kind, name = key.split(":")
        parameter = learner.lora.parameters[name]
        # AdamW counts its steps on the CPU.
        moved = tensor if kind == "optimizer.step" else tensor.to(parameter.device)
        if kind == "gradient":
            parameter.grad = moved
        else:
            learner.optimizer.state[parameter][kind.removeprefix("optimizer.")] = moved
