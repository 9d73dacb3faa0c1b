"""Checkpoints and the final LoRA of a run, in safe formats only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spo.lora_io.write import LORA_FILE, parameter_names, save_lora
from spo.method.metrics import Metrics
from spo.method.position import METRICS, PAIRS, TEXT, Position, RolloutInProgress, TrainingState
from spo.models.optimizers import optimizer_tensors, restore_optimizer
from spo.run.checkpoint_folder import (
    OPTIMIZER,
    check_numbers,
    new_checkpoint,
    read_state,
    reading,
    write_state,
)
from spo.types import Conditioning, PreferencePairs

if TYPE_CHECKING:
    from spo.launch.batch_plan import BatchPlan
    from spo.method.learner import Learner

_GRADIENT = "gradient:"


def save_networks(folder: Path, learner: Learner, metadata: Mapping[str, str]) -> None:
    """Writes the policy LoRA into `folder`, and the EMA LoRA, if any, into `folder`/ema."""
    header = {**metadata, "step": str(learner.updates)}
    save_lora(folder / LORA_FILE, learner.lora, learner.lora.parameters, header)
    if learner.ema is not None:
        (folder / "ema").mkdir(exist_ok=True)
        save_lora(folder / "ema" / LORA_FILE, learner.lora, learner.ema, header)


def own_tensors(learner: Learner, state: TrainingState) -> dict[str, Tensor]:
    """Returns the tensors that only this process has: accumulated gradients, pairs, metrics."""
    rollout = state.rollout.tensors() if state.rollout else {}
    return {_GRADIENT + name: g for name, g in learner.gradients().items()} | rollout


def save_checkpoint(
    run_dir: Path,
    learner: Learner,
    state: TrainingState,
    shares: Iterable[Mapping[str, Tensor]],
    facts: Mapping[str, Any],
    metadata: Mapping[str, str],
    limit: int,
) -> None:
    """Writes a checkpoint, then deletes the oldest beyond `limit` (0 keeps all).

    `shares` are the `own_tensors` of each process, on the CPU; `facts` are the entries that
    `resume.changes` reads.
    """
    numbers = {
        "position": asdict(state.position),
        "rollout": state.rollout and state.rollout.numbers(),
        "accumulated": learner.minibatches % learner.settings.accumulation_steps,
        "updates": learner.updates,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "scaler": learner.scaler.state_dict(),
        **facts,
    }
    with new_checkpoint(run_dir, state.name(), limit) as folder:
        save_networks(folder, learner, metadata)
        tensors = optimizer_tensors(learner.optimizer, learner.lora.parameters)
        save_file(tensors, folder / OPTIMIZER)
        for rank, share in enumerate(shares):
            save_file(dict(share), folder / _process_file(rank))
        write_state(folder, numbers)


def check_state(folder: Path, state: Mapping[str, Any], num_prompts: int) -> None:
    """Raises UserError if a run over that many prompts cannot have saved these numbers and metrics.

    So a file that was edited, or that another version wrote, is refused before the models load.
    """
    with reading(folder):
        at, plan = Position(**state["position"]), state["plan"]
        counts = ("accumulated", "updates", "skipped_in_a_row")
        check_numbers(asdict(at) | {name: state[name] for name in counts if name in state})
        check_numbers(plan, least=1)
        check_numbers(state.get("scaler", {}), kinds=(int, float))
        if state["accumulated"] >= plan["accumulation_steps"]:
            raise ValueError(f"accumulated is {state['accumulated']}")
        drawn = 0
        for file in _process_files(folder, plan) if state["rollout"] else ():
            rollout = rollout_of(load_file(file), state["rollout"], torch.device("cpu"))
            _check_rollout(rollout)
            drawn = rollout.prompts
        if at.prompts >= num_prompts or at.prompts + drawn > num_prompts:
            raise ValueError(f"{at.prompts} + {drawn} of {num_prompts} prompts are used")


def _check_rollout(rollout: RolloutInProgress) -> None:
    """Raises one of READ_ERRORS unless the numbers of a rollout can be, and its metrics summed up."""
    numbers, sums = rollout.numbers(), rollout.metrics.sums
    seconds = {name: numbers.pop(name) for name in ("seconds_rollout", "seconds_train")}
    check_numbers(seconds, kinds=(int, float))
    check_numbers({"prompts": numbers["prompts"]}, least=1)
    check_numbers(numbers)
    for kind, _, name in (key.partition(":") for key in sums):
        _ = sums[{"sum": "count:", "count": "sum:", "total": "total:"}[kind] + name]
    rollout.summary({name: float(value) for name, value in sums.items()})


def load_checkpoint(folder: Path, learner: Learner, plan: BatchPlan, rank: int) -> TrainingState:
    """Restores `learner`, and returns how far the run was; UserError if a file is missing or unfit.

    With another number of processes or minibatch size, unused pairs are dealt out again.
    """
    numbers = read_state(folder)
    with reading(folder):
        learner.lora.assign(parameter_names(load_file(folder / LORA_FILE)))
        learner.changed(learner.lora.parameters)
        if learner.ema is not None:
            ema = parameter_names(load_file(folder / "ema" / LORA_FILE))
            for name, tensor in learner.ema.items():
                tensor.copy_(ema[name])
            learner.changed(learner.ema)
        restore_optimizer(learner.optimizer, learner.lora.parameters, load_file(folder / OPTIMIZER))
        files = _process_files(folder, numbers["plan"])
        share, left = load_share(files, rank, plan.num_processes)
        if numbers["scaler"]:  # empty if the checkpoint is not of fp16
            learner.scaler.load_state_dict(numbers["scaler"])
        _restore_gradients(learner, _named(share, _GRADIENT), numbers)
        learner.updates = numbers["updates"]
        learner.skipped_in_a_row = numbers["skipped_in_a_row"]
        position, rollout = Position(**numbers["position"]), None
        if numbers["rollout"]:
            counted = numbers["rollout"] | {"left_over": numbers["rollout"]["left_over"] + left}
            rollout = rollout_of(share, counted, learner.backbone.device)
        return TrainingState(position, rollout)


def rollout_of(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device
) -> RolloutInProgress:
    """Returns the rollout that had these `tensors` and `numbers`."""
    on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
    conditioning = Conditioning(**_named(on_device, TEXT))
    pairs = PreferencePairs(**_named(on_device, PAIRS), conditioning=conditioning)
    metrics = Metrics(device, _named(on_device, METRICS))
    return RolloutInProgress(pairs=pairs, metrics=metrics, **numbers)


def load_share(files: Sequence[Path], rank: int, count: int) -> tuple[dict[str, Tensor], int]:
    """Returns the tensors that rank `rank` of `count` resumes with, read from one file per old rank.

    With the same number of processes each resumes with its own. Otherwise the pairs are dealt out
    again, in the order in which they were shuffled, the accumulated gradients are averaged, and rank 0
    takes the sums of the metrics. Also returns how many pairs cannot be dealt out evenly any more.
    Holds one file at a time.
    """
    if len(files) == count:
        return _aligned(load_file(files[rank])), 0
    share: dict[str, Tensor] = {}
    places: list[Tensor] = []
    left = 0
    for source, file in enumerate(files):
        loaded = load_file(file)
        if PAIRS + "timesteps" in loaded:
            each = len(loaded[PAIRS + "timesteps"])  # the same in every file
            left = each * len(files) % count
            place = torch.arange(each) * len(files) + source  # in the shuffled order
            mine = (place % count == rank) & (place < each * len(files) - left)
            places.append(place[mine])
        for name, tensor in loaded.items():
            if name.startswith(_GRADIENT):
                share[name] = share.get(name, 0) + tensor / len(files)
            elif name.startswith(METRICS):
                share[name] = share.get(name, 0) + tensor * (rank == 0)
            elif _has_rows(name):
                share[name] = torch.cat([*([share[name]] if name in share else []), tensor[mine]])
            else:
                share[name] = tensor
    if places:
        order = torch.argsort(torch.cat(places))
        share |= {name: share[name][order] for name in share if _has_rows(name)}
    return _aligned(share), left


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _has_rows(name: str) -> bool:
    """Tells if a tensor has one row per pair."""
    return name.startswith((PAIRS, f"{TEXT}prompt_embeds", f"{TEXT}pooled"))


def _aligned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors into torch's own memory: kernels may round differently on mapped files."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _restore_gradients(learner: Learner, gradients: Mapping[str, Tensor], numbers: dict) -> None:
    """Restores a partly accumulated gradient, rounded down to whole minibatches of the new plan."""
    then, now = numbers["plan"]["accumulation_steps"], learner.settings.accumulation_steps
    learner.minibatches = numbers["accumulated"] * now // then
    if learner.minibatches == 0:
        return
    share_of_update = (learner.minibatches * then) / (numbers["accumulated"] * now)
    scale = learner.scaler.get_scale() / numbers["scaler"].get("scale", 1.0) * share_of_update
    for name, gradient in gradients.items():
        parameter = learner.lora.parameters[name]
        parameter.grad = (gradient * scale).to(parameter.device)


def _process_file(rank: int) -> str:
    return f"process_{rank:04d}.safetensors"


def _process_files(folder: Path, plan: Mapping[str, Any]) -> list[Path]:
    """Returns the file of each process that saved a checkpoint; raises ValueError if one is missing."""
    files = sorted(folder.glob("process_*.safetensors"))
    if len(files) != plan["num_processes"]:
        raise ValueError(f"{len(files)} files of {plan['num_processes']} processes")
    return files
