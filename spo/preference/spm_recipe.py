"""From the config of an SPM's training to its values, its checks, and the models it starts from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from spo.command_line.config_files import check_leaves, leaves
from spo.command_line.values import Checked, choice, expand, fill, whole
from spo.hub import resolve_file
from spo.launch.batch_plan import UpdatePlan, plan_updates
from spo.models.backbone import DTYPES, Backbone
from spo.models.loading import ModelSource, check_source, model_source
from spo.models.optimizers import ADAMW, OptimizerSettings
from spo.preference.preparation import LabelSource, Preparation
from spo.preference.rows import UsableRows, find_training_rows, find_usable_rows
from spo.preference.source import PairData
from spo.preference.spm_learner import TrainSettings, check_state
from spo.run.checkpoint_folder import read_state, reading
from spo.run.folder import run_folder
from spo.run.resume import Resume, changes, find_checkpoint
from spo.run.tracking import TrackerSettings
from spo.scorers.clip import CLIPInputs, check_clip, clip_config, load_clip
from spo.scorers.pickscore import load_pickscore
from spo.scorers.step_aware_clip import StepAwareCLIP, fresh_step_aware_clip, load_step_aware_clip
from spo.seeding import derive_seed


@dataclass(frozen=True)
class SPMSource:
    """The SPM to start from; `config.preference` explains each field."""

    backbone: str
    processor: str
    init_from: str


@dataclass(frozen=True)
class SPMRecipe(Checked):
    """A config as checked values; the config explains each field of its name."""

    family: str
    seed: int
    mixed_precision: str = choice(*DTYPES)
    logdir: str
    run_name: str
    resume_from: str
    checkpoint_limit: int = whole(0)
    save_steps: int = whole()
    eval_steps: int = whole(0)
    log_steps: int = whole()
    base: ModelSource  # `config.pretrained`
    spm: SPMSource
    data: PairData
    labels: LabelSource
    train: TrainSettings
    tracker: TrackerSettings
    config: Mapping[str, Any]  # as JSON, for records

    @property
    def validates(self) -> bool:
        """True if the run measures accuracy."""
        return bool(self.eval_steps and self.data.validation_split)


def read_spm_recipe(config: ConfigDict) -> SPMRecipe:
    """Returns the values of `config`; raises UserError for a value that no run can work with."""
    check_leaves(leaves(config))
    values = json.loads(config.to_json())
    data, train = values["data"], values["train"]
    adamw = fill(OptimizerSettings, train, optimizer=ADAMW)
    steps = values["max_train_steps"]
    return fill(
        SPMRecipe,
        values,
        base=model_source(values["pretrained"]),
        spm=fill(SPMSource, values["preference"]),
        data=fill(PairData, data, source=expand(data["source"])),
        labels=fill(LabelSource, values["labels"]),
        train=fill(TrainSettings, train, max_train_steps=steps, optimizer=adamw),
        tracker=fill(TrackerSettings, values["tracker"]),
        config=values,
    )


@dataclass(frozen=True)
class CheckedTraining:
    """Everything that a run knows before its models load."""

    recipe: SPMRecipe
    plan: UpdatePlan
    train: UsableRows
    validation: UsableRows | None
    run_dir: Path
    resume: Resume
    changes: tuple[str, ...]  # since the checkpoint to resume from, a line each


def check_training(config: ConfigDict, num_processes: int) -> CheckedTraining:
    """Checks config, files and rows without writing anything; raises UserError in one line."""
    recipe = read_spm_recipe(config)
    data, spm, labels = recipe.data, recipe.spm, recipe.labels
    plan = plan_updates(config, num_processes)
    run_dir = run_folder(recipe.logdir, recipe.run_name, "spm", recipe.family)
    resume = find_checkpoint(run_dir, recipe.run_name, recipe.resume_from)
    told = ()
    if resume.checkpoint is not None:
        state = read_state(resume.checkpoint)
        with reading(resume.checkpoint):
            check_state(state)
            told = tuple(changes(state, recipe.config, plan, FIXED_KEYS.get))
    check_source(recipe.base, recipe.family)
    check_clip(spm.backbone, spm.processor)
    if spm.init_from:
        resolve_file(spm.init_from, "preference.init_from")
    if labels.source == "pickscore":
        check_clip(labels.backbone, labels.processor, "labels")
    rows = find_training_rows(data)
    validation = None
    if recipe.validates:
        validation = find_usable_rows(rows.data, data.validation_split, need_has_label=True)
    recipe = replace(recipe, data=rows.data)
    return CheckedTraining(recipe, plan, rows, validation, run_dir, resume, told)


# Keys that a resumed run may not change, with the reason. The run says every other change.
FIXED_KEYS = {
    **dict.fromkeys(
        ("family", "pretrained.model", "preference.backbone"),
        "its weights and optimizer state mean nothing to another",
    ),
    **dict.fromkeys(
        (
            *("seed", "data.train_split", "data.streaming", "data.shuffle_buffer"),
            *("data.filter", "data.filter_strategy"),
        ),
        "which rows come next follows from it",
    ),
}


def build_spm(source: SPMSource, seed: int, gradient_checkpointing: bool) -> StepAwareCLIP:
    """Returns an SPM in fp32, on the CPU, to train all of; raises UserError if it cannot load."""
    if source.init_from:
        key = "preference.init_from"
        spm = load_step_aware_clip(source.init_from, clip_config(source.backbone), key).float()
    else:
        spm = fresh_step_aware_clip(load_clip(source.backbone), derive_seed(seed, "spm"))
    if gradient_checkpointing:
        spm.model.gradient_checkpointing_enable({"use_reentrant": False})
    return spm.requires_grad_(True).train()


def build_preparation(recipe: SPMRecipe, device: torch.device) -> Preparation:
    """Loads the base model and the labeller; raises UserError if one cannot be loaded."""
    labels, labeller = recipe.labels, None
    if labels.source == "pickscore":
        clip = {"backbone": labels.backbone, "processor": labels.processor}
        labeller = load_pickscore(device, "labels", **clip)
    return Preparation(
        Backbone(recipe.base, recipe.family, recipe.mixed_precision, device),
        CLIPInputs(recipe.spm.processor),
        recipe.data.image_size,
        recipe.train.guidance_scale,
        recipe.seed,
        recipe.train.predict_batch_size,
        labeller,
        labels.margin,
    )
