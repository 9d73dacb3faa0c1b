"""Loads the models that an iteration runs on: with weights, with random ones, or with shapes only."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from ml_collections import ConfigDict

from spo import scorers
from spo.costs.weightless_models import (
    META,
    MetaBackbone,
    UnloadedBackbone,
    architecture_of,
    unloaded_scorer,
)
from spo.launch.batch_plan import BatchPlan, plan_batches
from spo.method import build
from spo.method.collect import CollectSettings
from spo.method.learner import Learner
from spo.method.losses import LOSSES
from spo.models import backbone
from spo.models.backbone import Backbone
from spo.models.device import set_up_device, speed_up
from spo.scorers import Scorer


@dataclass(frozen=True)
class Models:
    """The models of an iteration on one process; every comparison makes a pair."""

    backbone: Backbone
    scorer: Scorer
    learner: Learner
    collect: CollectSettings
    plan: BatchPlan
    optimizer: str  # train.optimizer


def load_models(config: ConfigDict, device: torch.device, random: bool = False) -> Models:
    """Returns the models of `config`, with a threshold that every comparison passes.

    `random` takes random weights and downloads nothing; on the meta device tensors have shapes only.
    A base model, CLIP or decoder that is not a local folder then has the published architecture:
    SD1.5's or SDXL's by its family, PickScore's, TAESD's. Raises UserError for a config or file that
    training would refuse.
    """
    build.check(config)
    set_up_device(device, config.allow_tf32)
    source, of_scorer = build.rollout_source(config), build.scorer_source(config)
    kind, load_scorer = Backbone, scorers.load_scorer
    if random or device == META:
        source = architecture_of(source, config.family)
        kind = MetaBackbone if device == META else UnloadedBackbone
        load_scorer = unloaded_scorer
    else:
        scorers.check_source(of_scorer)
    backbone.check_source(source, config.family)
    model, plan = (
        kind(source, config.family, config.mixed_precision, device),
        plan_batches(config, 1),
    )
    lora = build.build_lora(config, model.unet, seed=0)
    scorer = load_scorer(of_scorer, device)
    learner = build.build_learner(config, model, model.unet, lora, plan.accumulation_steps)
    collect = build.collect_settings(config)
    collect = replace(collect, pairs=replace(collect.pairs, threshold=-1.0))
    if config.train.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    models = Models(model, scorer, learner, collect, plan, config.train.optimizer)
    if device == META:
        return _countable(models)
    speed_up(model, scorer, build.speed_settings(config))
    return models


def _countable(models: Models) -> Models:
    """Returns `models` without the parts that look at numbers, which the meta device lacks."""
    learner = models.learner
    # GradScaler branches on values; its cost is one pass over the gradients.
    learner.scaler = torch.amp.GradScaler(enabled=False)
    if learner.objective not in LOSSES.values():  # a user's own loss may branch on values, too
        like = "gradspo" if learner.objective.uses_ema else "spo"
        learner.objective = replace(learner.objective, loss=LOSSES[like].loss)
    # Images are independent: one by one they cost what they cost together.
    return replace(models, collect=replace(models.collect, decode_batch_size=1))
