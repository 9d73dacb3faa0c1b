"""What of a run survives on disk: checkpoints and the final LoRA, in safe formats alone."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
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

    `gradients` are those accumulated so far, averaged over all processes.
    """
    state = {
        "epochs": position.epochs,
        "rollouts": position.rollouts,
        "minibatches": learner.minibatches,
        "updates": learner.updates,
        "scaler": learner.scaler.state_dict(),
    }
    tensors = {f"gradient:{name}": tensor.contiguous() for name, tensor in gradients.items()}
    tensors |= optimizer_tensors(learner.optimizer, learner.lora.parameters)
    with new_checkpoint(run_dir, f"epoch_{position.epochs:04d}", limit) as folder:
        save_networks(folder, learner, metadata)
        write_state(folder, state, tensors)


@contextlib.contextmanager
def new_checkpoint(run_dir: Path, name: str, limit: int) -> Iterator[Path]:
    """A folder to fill, which appears under its name only when it is complete.

    Then the oldest checkpoints beyond `limit` are deleted (0 keeps all).
    """
    folder = run_dir / _FOLDER / name
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    if limit:
        for old in checkpoints(run_dir)[:-limit]:
            shutil.rmtree(old)


def write_state(folder: Path, state: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write what a checkpoint holds besides its networks."""
    save_file(tensors, folder / f"{_STATE}.safetensors")
    (folder / f"{_STATE}.json").write_text(json.dumps(state, indent=1))


def read_state(folder: Path) -> dict[str, Any]:
    """The numbers that `write_state` wrote."""
    return json.loads((folder / f"{_STATE}.json").read_text())


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that `write_state` wrote."""
    return load_file(folder / f"{_STATE}.safetensors")


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_dir / _FOLDER).glob("*_[0-9]*") if p.suffix != ".partial")


def load_checkpoint(folder: Path, learner: Learner) -> Position:
    """Put `learner` into the state that was saved; UserError where a file is missing or unfit."""
    try:
        state = read_state(folder)
        learner.lora.assign(parameter_names(load_file(folder / FILE_NAME)))
        if learner.ema is not None:
            ema = parameter_names(load_file(folder / "ema" / FILE_NAME))
            for name, tensor in learner.ema.items():
                tensor.copy_(ema[name])
        restore_tensors(learner.optimizer, learner.lora.parameters, read_tensors(folder))
        learner.minibatches, learner.updates = state["minibatches"], state["updates"]
        learner.scaler.load_state_dict(state["scaler"])
        return Position(state["epochs"], state["rollouts"])
    except (*LOAD_ERRORS, KeyError) as error:
        raise unfit(folder, error) from error


def unfit(folder: Path, error: Exception) -> UserError:
    """The error of a checkpoint that cannot be resumed from."""
    return UserError(
        f"resume_from: {folder} is not a checkpoint of this config ({first_line(error)}); choose "
        "another checkpoint, or start anew."
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a checkpoint that can be resumed from."""
    return (folder / f"{_STATE}.json").is_file()


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Optimizer state by kind and parameter name."""
    return {
        f"optimizer.{kind}:{name}": torch.as_tensor(value).contiguous()
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def restore_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put optimizer state and gradients, by kind and parameter name, back in their places."""
    for key, tensor in tensors.items():
        kind, name = key.split(":")
        parameter = parameters[name]
        # AdamW counts its steps on the CPU.
        moved = tensor if kind == "optimizer.step" else tensor.to(parameter.device)
        if kind == "gradient":
            parameter.grad = moved
        else:
            optimizer.state[parameter][kind.removeprefix("optimizer.")] = moved
