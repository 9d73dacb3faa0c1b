"""From the config of an SPM's training to the values that each stage uses, and their checks."""

from __future__ import annotations

import math
import os

import torch
from ml_collections import ConfigDict

from spo.errors import UserError
from spo.launch.workers import Workers
from spo.method.build import model_source
from spo.models.backbone import DTYPES, Backbone
from spo.preference.model import PairScorer, build_spm
from spo.preference.preparation import Labeller, Preparation
from spo.preference.source import DataSource
from spo.preference.spm_learner import PreferenceLearner, UpdateSettings
from spo.scorers.clip import CLIPInputs, load_clip
from spo.scorers.pickscore import PickScore
from spo.scorers.step_aware_clip import StepAwareCLIP
from spo.seeding import derive_seed

_AT_LEAST = {
    "checkpoint_limit": 0,
    "max_train_steps": 1,
    "save_steps": 1,
    "eval_steps": 0,
    "log_steps": 1,
    "data.image_size": 1,
    "data.shuffle_buffer": 1,
    "data.num_workers": 0,
    "data.max_validation": 0,
    "train.predict_batch_size": 1,
    "train.warmup_steps": 0,
    "train.max_skipped_updates": 1,
}
_FROM_0_TO_1 = ("labels.margin", "train.adam_beta1", "train.adam_beta2")


def check(config: ConfigDict) -> None:
    """Raise UserError for every value that no run can work with."""
    values = config.to_dict()
    for key, least in _AT_LEAST.items():
        value = _at(values, key)
        if value < least:
            raise UserError(f"{key}: {value} must be a whole number from {least}.")
    for key in _FROM_0_TO_1:
        value = _at(values, key)
        if not 0 <= value < 1:
            raise UserError(f"{key}: {value} must be from 0 to below 1.")
    _check_choice("mixed_precision", config.mixed_precision, DTYPES)
    _check_choice("labels.source", config.labels.source, ("data", "pickscore"))
    train = config.train
    for key in ("learning_rate", "adam_epsilon", "max_grad_norm"):
        value = train[key]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"train.{key}: {value} must be above 0.")
    for key in ("adam_weight_decay", "guidance_scale"):
        if not (train[key] >= 0 and math.isfinite(train[key])):
            raise UserError(f"train.{key}: {train[key]} must be from 0.")
    if train.warmup_steps >= config.max_train_steps:
        raise UserError(
            f"train.warmup_steps: {train.warmup_steps} must be below max_train_steps = "
            f"{config.max_train_steps}."
        )


def _at(values: dict, key: str) -> float:
    for name in key.split("."):
        values = values[name]
    return values


def _check_choice(key: str, value: str, choices) -> None:
    if value not in choices:
        raise UserError(f"{key}: {value!r} is none of {', '.join(choices)}.")


def data_source(config: ConfigDict) -> DataSource:
    data = config.data
    return DataSource(
        os.path.expanduser(data.source), data.revision, data.streaming, data.train_split
    )


def update_settings(config: ConfigDict) -> UpdateSettings:
    train = config.train
    return UpdateSettings(
        learning_rate=train.learning_rate,
        warmup_steps=train.warmup_steps,
        total_steps=config.max_train_steps,
        max_grad_norm=train.max_grad_norm,
        in_batch_negatives=train.in_batch_negatives,
    )


def build_preparation(config: ConfigDict, device: torch.device) -> Preparation:
    """The base model and whatever else stands before the SPM; UserError where it cannot load."""
    labeller = None
    if config.labels.source == "pickscore":
        inputs = CLIPInputs(config.labels.processor, "labels")
        scorer = PickScore(load_clip(config.labels.backbone, "labels"), inputs, device)
        labeller = Labeller(scorer, config.labels.margin)
    return Preparation(
        backbone=Backbone(model_source(config), config.family, config.mixed_precision, device),
        inputs=CLIPInputs(config.preference.processor),
        image_size=config.data.image_size,
        guidance_scale=config.train.guidance_scale,
        seed=config.seed,
        at_once=config.train.predict_batch_size,
        labeller=labeller,
    )


def load_spm(config: ConfigDict) -> StepAwareCLIP:
    """The SPM to train, on the CPU; UserError where it cannot be loaded."""
    return build_spm(
        config.preference.backbone,
        config.preference.init_from,
        derive_seed(config.seed, "spm"),
        config.train.gradient_checkpointing,
    )


def build_learner(config: ConfigDict, spm: StepAwareCLIP, workers: Workers) -> PreferenceLearner:
    """The learner of a run, on this process's device; every process has to call it."""
    train, spm = config.train, spm.to(workers.device)
    optimizer = torch.optim.AdamW(
        spm.parameters(),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
    )
    return PreferenceLearner(
        spm=spm,
        scorer=workers.wrap(PairScorer(spm)),
        optimizer=optimizer,
        settings=update_settings(config),
        device=workers.device,
        dtype=DTYPES[config.mixed_precision],
        processes=workers.count,
        rank=workers.rank,
    )
