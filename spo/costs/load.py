"""Loads the models that an iteration runs on: with weights, with random ones, or with shapes only."""

from dataclasses import dataclass, replace

import torch
from ml_collections import ConfigDict

from spo.costs.weightless_models import (
    META,
    MetaBackbone,
    UnloadedBackbone,
    architecture_of,
    unloaded_scorer,
)
from spo.launch.batch_plan import BatchPlan, plan_batches
from spo.method.build import Recipe, build_learner, read_recipe
from spo.method.learner import Learner
from spo.method.losses import SPO, GradSPO
from spo.models.backbone import Backbone
from spo.models.device import set_up_device, speed_up
from spo.models.loading import check_source
from spo.scorers import Scorer, check_scorer, load_scorer


@dataclass(frozen=True)
class Models:
    """The models of an iteration on one process; every comparison makes a pair."""

    backbone: Backbone
    scorer: Scorer
    learner: Learner
    recipe: Recipe
    plan: BatchPlan


def load_models(config: ConfigDict, device: torch.device, random: bool = False) -> Models:
    """Returns the models of `config`, with a threshold that every comparison passes.

    `random` takes random weights and downloads nothing; on the meta device tensors have shapes only.
    A base model, CLIP or decoder that is not a local folder then has the published architecture:
    SD1.5's or SDXL's by its family, PickScore's, TAESD's. Raises UserError for a config or file that
    training would refuse.
    """
    recipe, plan = read_recipe(config), plan_batches(config, 1)
    run = recipe.run
    set_up_device(device, run.allow_tf32)
    source, kind, make_scorer = recipe.model, Backbone, load_scorer
    if random or device == META:
        source = architecture_of(source, run.family)
        kind = MetaBackbone if device == META else UnloadedBackbone
        make_scorer = unloaded_scorer
    else:
        check_scorer(recipe.scorer)
    check_source(source, run.family)
    model = kind(source, run.family, run.mixed_precision, device)
    lora = recipe.lora.add_to(model.unet, seed=0)
    scorer = make_scorer(recipe.scorer, device)
    learner = build_learner(recipe, model, model.unet, lora, plan.accumulation_steps)
    collect = replace(recipe.collect, pairs=replace(recipe.collect.pairs, threshold=-1.0))
    if run.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if device == META:
        _leave_out_numbers(learner)
        # Images are independent: one by one they cost what they cost together.
        collect = replace(collect, decode_batch_size=1)
    else:
        speed_up(model, scorer, recipe.speed)
    return Models(model, scorer, learner, replace(recipe, collect=collect), plan)


def _leave_out_numbers(learner: Learner) -> None:
    """Replaces the parts that look at numbers, which the meta device lacks."""
    # GradScaler branches on values; its cost is one pass over the gradients.
    learner.scaler = torch.amp.GradScaler(enabled=False)
    if not isinstance(learner.loss, GradSPO | SPO):  # a user's own loss may branch on values, too
        learner.loss = GradSPO(10.0, 0.1, 0.5) if learner.loss.uses_ema else SPO(10.0, 0.1)
