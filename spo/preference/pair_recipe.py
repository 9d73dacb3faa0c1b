"""From the config of a preference model's training to its values, its checks, and its models."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from spo.command_line.config_files import SPM_BASE, check_leaves, leaves, load_config
from spo.command_line.values import Checked, choice, expand, fill, require_choice, whole
from spo.errors import UserError
from spo.hub import resolve_file
from spo.launch.batch_plan import UpdatePlan, plan_updates
from spo.models.backbone import DTYPES, Backbone
from spo.models.loading import ModelSource, check_source, model_source
from spo.models.optimizers import ADAMW, OptimizerSettings
from spo.preference.lrm import LatentBase, LRMPairScorer, LRMPreparation, LRMSource
from spo.preference.pair_learner import PairScorer, SPMPairScorer, TrainSettings, check_state
from spo.preference.preparation import LabelSource, Preparation, SPMPreparation
from spo.preference.rows import UsableRows, find_training_rows, find_usable_rows
from spo.preference.source import PairData
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

    def check(self) -> None:
        """Raises UserError unless the files are there and fit, as small files tell."""
        check_clip(self.backbone, self.processor)
        if self.init_from:
            resolve_file(self.init_from, "preference.init_from")


# By `preference.model`: its source, and the keys that are of no use with the others.
_MODELS = {
    "step_aware_clip": (
        SPMSource,
        ("preference.backbone", "preference.processor", "train.guidance_scale"),
    ),
    "latent_reward": (
        LRMSource,
        ("preference.guidance_scale", "preference.guide_stages", "preference.text_projection"),
    ),
}


@dataclass(frozen=True)
class PairRecipe(Checked):
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
    keep_best: bool
    log_steps: int = whole()
    base: ModelSource  # `config.pretrained`
    start: SPMSource | LRMSource
    data: PairData
    labels: LabelSource
    train: TrainSettings
    tracker: TrackerSettings
    config: Mapping[str, Any]  # as JSON, for records

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_best and not self.validates:
            reason = "needs the accuracy that eval_steps and data.validation_split measure"
            raise UserError(f"keep_best: True {reason}; set both, or set it to False.")

    @property
    def is_latent(self) -> bool:
        """True if the model is an LRM, not an SPM."""
        return isinstance(self.start, LRMSource)

    @property
    def validates(self) -> bool:
        """True if the run measures accuracy."""
        return bool(self.eval_steps and self.data.validation_split)


def read_pair_recipe(config: ConfigDict) -> PairRecipe:
    """Returns the values of `config`; raises UserError for a value that no run can work with."""
    check_leaves(leaves(config))
    values = json.loads(config.to_json())
    data, train = values["data"], values["train"]
    adamw = fill(OptimizerSettings, train, optimizer=ADAMW)
    steps, model = values["max_train_steps"], values["preference"]["model"]
    require_choice("preference.model", model, _MODELS)
    _check_keys(model, config)
    source, _ = _MODELS[model]
    return fill(
        PairRecipe,
        values,
        base=model_source(values["pretrained"]),
        start=fill(source, values["preference"]),
        data=fill(PairData, data, source=expand(data["source"])),
        labels=fill(LabelSource, values["labels"]),
        train=fill(TrainSettings, train, max_train_steps=steps, optimizer=adamw),
        tracker=fill(TrackerSettings, values["tracker"]),
        config=values,
    )


def _check_keys(model: str, config: ConfigDict) -> None:
    """Raises UserError if a key is set that only other models read."""
    values, defaults = leaves(config), leaves(load_config(SPM_BASE, SPM_BASE))
    for other, (_, keys) in _MODELS.items():
        for key in keys if other != model else ():
            if values[key] != defaults[key]:
                raise UserError(
                    f"{key}: {values[key]!r} has no effect with preference.model={model}, only with "
                    f"{other}; leave it at {defaults[key]!r}."
                )


@dataclass(frozen=True)
class CheckedTraining:
    """Everything that a run knows before its models load."""

    recipe: PairRecipe
    plan: UpdatePlan
    train: UsableRows
    validation: UsableRows | None
    run_dir: Path
    resume: Resume
    changes: tuple[str, ...]  # since the checkpoint to resume from, a line each


def check_training(config: ConfigDict, num_processes: int) -> CheckedTraining:
    """Checks config, files and rows without writing anything; raises UserError in one line."""
    recipe = read_pair_recipe(config)
    data, labels = recipe.data, recipe.labels
    plan = plan_updates(config, num_processes)
    run_dir = run_folder(
        recipe.logdir, recipe.run_name, "lrm" if recipe.is_latent else "spm", recipe.family
    )
    resume = find_checkpoint(run_dir, recipe.run_name, recipe.resume_from)
    told = ()
    if resume.checkpoint is not None:
        state = read_state(resume.checkpoint)
        with reading(resume.checkpoint):
            check_state(state)
            told = tuple(changes(state, recipe.config, plan, FIXED_KEYS.get))
    configs = check_source(recipe.base, recipe.family)
    if recipe.is_latent:
        recipe.start.check(recipe.family, configs, data.image_size)
    else:
        recipe.start.check()
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
        ("family", "pretrained.model", "preference.model", "preference.backbone"),
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


def build_scorer(recipe: PairRecipe, base: Backbone) -> PairScorer:
    """Returns the model to train, on the device of `base`, a fresh LRM's networks out of that."""
    seed, gradient_checkpointing = recipe.seed, recipe.train.gradient_checkpointing
    if recipe.is_latent:
        whole_unet = partial(recipe.start.whole_unet, recipe.base, recipe.family)
        model = recipe.start.build(base, seed, gradient_checkpointing)
        scorer = LRMPairScorer(model, base, whole_unet)
    else:
        scorer = SPMPairScorer(build_spm(recipe.start, seed, gradient_checkpointing))
    return scorer.to(base.device)


def build_preparation(recipe: PairRecipe, device: torch.device) -> Preparation:
    """Loads the base model and the labeller; raises UserError if one cannot be loaded."""
    labels, labeller = recipe.labels, None
    if labels.source == "pickscore":
        clip = {"backbone": labels.backbone, "processor": labels.processor}
        labeller = load_pickscore(device, "labels", **clip)
    load = LatentBase if recipe.is_latent else Backbone
    shared = {
        "backbone": load(recipe.base, recipe.family, recipe.mixed_precision, device),
        "image_size": recipe.data.image_size,
        "num_timesteps": recipe.train.num_timesteps,
        "seed": recipe.seed,
        "at_once": recipe.train.predict_batch_size,
        "labeller": labeller,
        "margin": labels.margin,
    }
    if recipe.is_latent:
        return LRMPreparation(**shared)
    inputs = CLIPInputs(recipe.start.processor)
    return SPMPreparation(**shared, inputs=inputs, guidance_scale=recipe.train.guidance_scale)
