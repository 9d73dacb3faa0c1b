"""From the config to the values that each stage uses, and every check that needs no file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from typing import Any

from ml_collections import ConfigDict
from torch import nn

from spo.errors import UserError
from spo.hub import Destination, public_name
from spo.method import rollout
from spo.method.collect import CollectSettings
from spo.method.learner import Learner, UpdateSettings
from spo.method.losses import LOSSES, LossSettings, Objective
from spo.method.pairs import PairSettings
from spo.method.rollout import RolloutSettings
from spo.models.backbone import DTYPES, Backbone, ModelSource
from spo.models.device import SpeedSettings
from spo.models.lora import Lora, add_lora
from spo.models.optimizers import OPTIMIZERS, make_optimizer
from spo.models.plain_images import ImageSettings
from spo.plugins import find
from spo.scorers import ScorerSource


def objective(config: ConfigDict) -> Objective:
    """The loss that `config.algorithm` names."""
    found = find(config.algorithm, LOSSES, "algorithm")
    if not isinstance(found, Objective):
        raise UserError(f"algorithm: {config.algorithm} is not a spo.method.losses.Objective.")
    return found


def rollout_settings(config: ConfigDict) -> RolloutSettings:
    sample = config.sample
    return RolloutSettings(
        num_candidates=sample.num_candidates,
        branch_from=sample.branch_from,
        num_inner_steps=sample.num_inner_steps,
        eta=sample.eta,
        extend_final=sample.final_step == "extend",
        final_score_timestep=sample.final_score_timestep,
    )


def pair_settings(config: ConfigDict) -> PairSettings:
    sample = config.sample
    one_transition = sample.num_inner_steps == 0 and sample.final_step == "branch"
    shares_latents = objective(config).shares_latents
    return PairSettings(
        threshold=sample.threshold,
        keep_all_final=sample.keep_all_final,
        direction_from_last=sample.final_direction == "last",
        branching_only=shares_latents,
        one_x_t=shares_latents or one_transition,
        keep_predictions=objective(config).uses_ema and config.train.ema_prediction == "rollout",
    )


def collect_settings(config: ConfigDict) -> CollectSettings:
    return CollectSettings(
        rollout=rollout_settings(config),
        pairs=pair_settings(config),
        guidance_scale=config.sample.guidance_scale,
        decode_batch_size=config.sample.decode_batch_size,
    )


def loss_settings(config: ConfigDict) -> LossSettings:
    train = config.train
    return LossSettings(
        beta=train.beta,
        clip_eps=train.clip_eps,
        grad_scale=train.grad_scale,
        eta=config.sample.eta,
    )


def build_learner(
    config: ConfigDict, backbone: Backbone, unet: nn.Module, lora: Lora, accumulation_steps: int
) -> Learner:
    """The learner of a run; `unet` is the backbone's, or its DDP wrapper."""
    train, schedule = config.train, backbone.schedule(config.sample.num_steps)
    if not objective(config).shares_latents and schedule.timesteps[-1] == 0:
        raise UserError(
            f"pretrained.model: the scheduler of {config.pretrained.model} ends at t = 0, where "
            f"{config.algorithm} has no likelihood (sigma is 0); set its steps_offset to 1."
        )
    optimizer = make_optimizer(
        train.optimizer,
        lora.parameters.values(),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.adam_weight_decay,
        eps=train.adam_epsilon,
    )
    return Learner(
        backbone=backbone,
        unet=unet,
        lora=lora,
        optimizer=optimizer,
        objective=objective(config),
        schedule=schedule,
        loss_settings=loss_settings(config),
        settings=UpdateSettings(
            accumulation_steps=accumulation_steps,
            max_grad_norm=train.max_grad_norm,
            ema_decay=train.ema_decay,
            ema_every=train.ema_every,
            merge_lora=config.lora.merge,
            skip_ema_pass=config.train.ema_prediction == "none",
        ),
        guidance_scale=config.sample.guidance_scale,
        reference=lora.snapshot() if config.lora.reference == "init" else None,
    )


def model_source(config: ConfigDict) -> ModelSource:
    source = ModelSource(**config.pretrained.to_dict())
    vae = None if source.vae is None else os.path.expanduser(source.vae)
    return replace(source, model=os.path.expanduser(source.model), vae=vae)


def rollout_source(config: ConfigDict) -> ModelSource:
    """The base model with what decodes the candidates of its rollouts."""
    decoder = config.sample.decoder
    return replace(
        model_source(config), decoder=None if decoder is None else os.path.expanduser(decoder)
    )


def scorer_source(config: ConfigDict) -> ScorerSource:
    return ScorerSource(**config.preference.to_dict())


def build_lora(config: ConfigDict, unet: nn.Module, seed: int) -> Lora:
    """A fresh LoRA on `unet`; its alpha is the rank where lora.alpha is None."""
    lora = config.lora
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return add_lora(unet, lora.rank, alpha, lora.target_modules, seed)


def speed_settings(config: ConfigDict) -> SpeedSettings:
    return SpeedSettings(
        channels_last=config.channels_last,
        compile_unet=config.compile.unet,
        compile_vae=config.compile.vae,
        compile_scorer=config.compile.scorer,
    )


def image_settings(config: ConfigDict) -> ImageSettings:
    evaluation = config.eval
    return ImageSettings(evaluation.num_steps, evaluation.guidance_scale, evaluation.seed)


def destination(config: ConfigDict) -> Destination:
    hub = config.hub
    return Destination(
        repo_id=hub.repo_id,
        subfolder=hub.subfolder,
        weights=hub.weights,
        private=hub.private,
        branch=hub.branch,
        license=hub.license,
    )


def lora_metadata(config: ConfigDict) -> dict[str, str]:
    """What a LoRA file says of its origin; the same for equal training, wherever it ran."""
    sections = ("pretrained", "lora", "prompts", "preference", "sample", "train")
    recipe = {name: config[name].to_dict() for name in sections}
    recipe |= {name: config[name] for name in ("seed", "num_epochs", "mixed_precision")}
    text = json.dumps(recipe, sort_keys=True, default=list)
    return {
        "base_model": public_name(config.pretrained.model),
        "algorithm": config.algorithm,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def check(config: ConfigDict) -> None:
    """Raise UserError for everything that is wrong with a config as far as no file is needed."""
    if config.mixed_precision not in DTYPES:
        raise UserError(
            f"mixed_precision: {config.mixed_precision!r} is none of {', '.join(DTYPES)}."
        )
    _check_choices(config)
    _check_numbers(config)
    rollout.check_settings(rollout_settings(config), config.sample.num_steps)
    if objective(config).shares_latents and config.sample.num_inner_steps > 0:
        raise UserError(
            f"sample.num_inner_steps: {config.algorithm} compares candidates of one shared x_t and "
            "cannot use inner steps; set it to 0, or algorithm=spo."
        )
    if config.train.ema_prediction == "none" and config.train.clip_eps is not None:
        raise UserError(
            "train.ema_prediction: without the EMA's prediction the clips cannot be computed; set "
            "train.clip_eps=None with 'none', or use 'fresh' or 'rollout'."
        )
    modules = config.lora.target_modules
    if not modules or not all(isinstance(name, str) for name in modules):
        raise UserError("lora.target_modules: name at least one layer, and nothing but layers.")
    if config.lora.reference == "init" and not config.lora.init_from:
        raise UserError("lora.reference: 'init' needs lora.init_from to name a LoRA.")


_CHOICES = {
    "sample.final_step": ("branch", "extend"),
    "sample.final_score_timestep": ("zero", "t"),
    "sample.final_direction": ("window", "last"),
    "train.optimizer": OPTIMIZERS,
    "train.ema_every": ("optimizer_step", "window"),
    "train.ema_prediction": ("fresh", "rollout", "none"),
    "eval.weights": ("policy", "ema"),
    "lora.reference": ("base", "init"),
    "hub.weights": ("policy", "ema"),
}


def _check_choices(config: ConfigDict) -> None:
    for key, choices in _CHOICES.items():
        value = _get(config, key)
        if value not in choices:
            raise UserError(f"{key}: {value!r} is none of {', '.join(choices)}.")
    for key in ("eval.weights", "hub.weights"):
        if _get(config, key) == "ema" and not objective(config).uses_ema:
            raise UserError(f"{key}: {config.algorithm} has no EMA; use policy.")


# What each number must be; None in the config stands for "off" or "derived" and passes.
_RULES = (
    (
        "a whole number from 1",
        lambda v: v >= 1,
        "num_epochs save_interval lora.rank lora.alpha sample.batch_size "
        "sample.global_batch_size sample.decode_batch_size train.batch_size "
        "train.global_batch_size train.gradient_accumulation_steps train.max_skipped_updates "
        "eval.num_images",
    ),
    (
        "a whole number from 1 to 1000, the timesteps that models are trained with",
        lambda v: 1 <= v <= 1000,
        "sample.num_steps eval.num_steps",
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        "checkpoint_limit save_every_rollouts eval_interval prompts.num sample.guidance_scale "
        "train.adam_weight_decay eval.guidance_scale hub.push_every",
    ),
    (
        "above 0",
        lambda v: v > 0,
        "train.learning_rate train.adam_epsilon train.max_grad_norm train.beta train.grad_scale",
    ),
    ("from 0 to 1", lambda v: 0 <= v <= 1, "sample.threshold train.ema_decay"),
    ("from 0 to below 1", lambda v: 0 <= v < 1, "train.adam_beta1 train.adam_beta2"),
    ("above 0 and below 1, or None", lambda v: 0 < v < 1, "train.clip_eps"),
    (
        "above 0 (at 0 all candidates are the same) and at most 1",
        lambda v: 0 < v <= 1,
        "sample.eta",
    ),
)


def _check_numbers(config: ConfigDict) -> None:
    for wanted, holds, keys in _RULES:
        for key in keys.split():
            value = _get(config, key)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise UserError(f"{key}: {value} must be {wanted}.")


def _get(config: ConfigDict, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config
