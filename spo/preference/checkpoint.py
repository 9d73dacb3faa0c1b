"""What of the training of an SPM survives on disk, in safe formats alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from spo.checkpoint import (
    new_checkpoint,
    optimizer_tensors,
    read_state,
    read_tensors,
    restore_tensors,
    unfit,
    write_state,
)
from spo.hub import LOAD_ERRORS
from spo.preference.learner import PreferenceLearner
from spo.step_aware_clip import StepAwareCLIP

FILE_NAME = "step_aware_preference_model.safetensors"


def save_spm(folder: Path, spm: StepAwareCLIP, as_bin: bool = False) -> None:
    """Write the state dict, as `preference.checkpoint` takes it; with `as_bin` as a .bin, too."""
    weights = {name: t.detach().cpu().contiguous() for name, t in spm.state_dict().items()}
    save_file(weights, folder / FILE_NAME, metadata={"format": "pt"})
    if as_bin:
        torch.save(weights, (folder / FILE_NAME).with_suffix(".bin"))


def save_checkpoint(run_dir: Path, learner: PreferenceLearner, limit: int) -> None:
    """Write a checkpoint, then delete the oldest beyond `limit` (0 keeps all)."""
    tensors = optimizer_tensors(learner.optimizer, dict(learner.spm.named_parameters()))
    with new_checkpoint(run_dir, f"step_{learner.step:07d}", limit) as folder:
        save_spm(folder, learner.spm)
        write_state(folder, {"step": learner.step, "scaler": learner.scaler.state_dict()}, tensors)


def load_checkpoint(folder: Path, learner: PreferenceLearner) -> None:
    """Put `learner` into the state that was saved; UserError where a file is missing or unfit."""
    try:
        state = read_state(folder)
        learner.spm.load_state_dict(load_file(folder / FILE_NAME), strict=True)
        parameters = dict(learner.spm.named_parameters())
        restore_tensors(learner.optimizer, parameters, read_tensors(folder))
        learner.scaler.load_state_dict(state["scaler"])
        learner.step = state["step"]
    except (*LOAD_ERRORS, KeyError) as error:
        raise unfit(folder, error) from error
