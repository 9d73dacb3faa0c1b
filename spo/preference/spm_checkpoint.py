"""Checkpoints of an SPM's training, in safe formats only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from spo.atomic import replacing
from spo.models.optimizers import optimizer_tensors, restore_optimizer
from spo.preference.spm_learner import PreferenceLearner
from spo.run.checkpoint_folder import OPTIMIZER, read_state, reading, write_state
from spo.run.folder import SPM_FILE
from spo.scorers.step_aware_clip import StepAwareCLIP


def save_spm(folder: Path, spm: StepAwareCLIP, as_bin: bool = False) -> None:
    """Writes the state dict that `preference.checkpoint` takes, with `as_bin` also as a .bin."""
    weights = {name: t.detach().cpu().contiguous() for name, t in spm.state_dict().items()}
    with replacing(folder / SPM_FILE) as path:
        save_file(weights, path, metadata={"format": "pt"})
    if as_bin:
        with replacing((folder / SPM_FILE).with_suffix(".bin")) as path:
            torch.save(weights, path)


@dataclass
class Tally:
    """The state of a training outside its learner."""

    totals: Counter = field(default_factory=Counter)  # metrics since the last line
    left_out: Counter = field(default_factory=Counter)  # rows, by their faults
    # True between an optimizer step and its evaluation and line of metrics.
    line_is_due: bool = False


def save(folder: Path, learner: PreferenceLearner, tally: Tally, facts: Mapping[str, Any]) -> None:
    """Writes the files of a checkpoint; `facts` is what `spo.run.resume.checkpoint_facts` returns."""
    (group,) = learner.optimizer.param_groups
    state = {
        "step": learner.step,
        "skipped_in_a_row": learner.skipped_in_a_row,
        "learning_rate": group["lr"],  # of this step, whose line may be due
        "scaler": learner.scaler.state_dict(),
        **vars(tally),
        **facts,
    }
    tensors = optimizer_tensors(learner.optimizer, dict(learner.spm.named_parameters()))
    save_spm(folder, learner.spm)
    save_file(tensors, folder / OPTIMIZER)
    write_state(folder, state)


def load(folder: Path, learner: PreferenceLearner) -> Tally:
    """Restores `learner` and returns the tally; raises UserError if a file is missing or unfit."""
    state = read_state(folder)
    with reading(folder):
        learner.spm.load_state_dict(load_file(folder / SPM_FILE), strict=True)
        parameters = dict(learner.spm.named_parameters())
        restore_optimizer(learner.optimizer, parameters, load_file(folder / OPTIMIZER))
        if state["scaler"]:  # empty unless the checkpoint is of fp16
            learner.scaler.load_state_dict(state["scaler"])
        learner.step = state["step"]
        (group,) = learner.optimizer.param_groups
        group["lr"] = state["learning_rate"]
        learner.skipped_in_a_row = state["skipped_in_a_row"]
        totals, left_out = Counter(state["totals"]), Counter(state["left_out"])
        return Tally(totals, left_out, state["line_is_due"])
