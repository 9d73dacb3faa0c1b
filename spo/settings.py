"""From the config to the values that each stage uses, and every check that needs no model.

The only file besides the trainer that reads config keys.
"""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from spo import backbone, rollout, scorers
from spo.backbone import DTYPES, ModelSource
from spo.collect import CollectSettings
from spo.dotted import find
from spo.errors import UserError
from spo.learner import UpdateSettings
from spo.losses import LOSSES, LossSettings, Objective
from spo.pairs import PairSettings
from spo.rollout import RolloutSettings
from spo.scorers import ScorerSource


def objective(config: ConfigDict) -> Objective:
    """The loss that `config.algorithm` names."""
    return find(config.algorithm, LOSSES, "algorithm")


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


def update_settings(config: ConfigDict, accumulation_steps: int) -> UpdateSettings:
    train = config.train
    return UpdateSettings(
        accumulation_steps=accumulation_steps,
        max_grad_norm=train.max_grad_norm,
        ema_decay=train.ema_decay,
        ema_every=train.ema_every,
    )


def optimizer_options(config: ConfigDict) -> dict:
    """Keyword arguments of torch.optim.AdamW."""
    train = config.train
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "weight_decay": train.adam_weight_decay,
        "eps": train.adam_epsilon,
    }


def model_source(config: ConfigDict) -> ModelSource:
    return ModelSource(**config.pretrained.to_dict())


def scorer_source(config: ConfigDict) -> ScorerSource:
    return ScorerSource(**config.preference.to_dict())


def lora_alpha(config: ConfigDict) -> int:
    """lora.alpha, or the rank where it is None."""
    return config.lora.rank if config.lora.alpha is None else config.lora.alpha
