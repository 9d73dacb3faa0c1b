"""The losses: pure functions of noise predictions and pairs.

A new loss is a function with the signature of `gradspo_loss` and an `Objective` that says what it
needs; name it in `config.algorithm`, here in `LOSSES` or as "module:name".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.method import ddim
from spo.method.ddim import DDIMSchedule
from spo.types import LossOutput, NoisePredictions, PreferencePairs


@dataclass(frozen=True)
class LossSettings:
    """Scalars of the losses; the config file explains them."""

    beta: float
    clip_eps: float | None
    grad_scale: float
    eta: float


LossFunction = Callable[[NoisePredictions, PreferencePairs, DDIMSchedule, LossSettings], LossOutput]


@dataclass(frozen=True)
class Objective:
    """A loss and what the training loop must provide for it."""

    loss: LossFunction
    uses_ema: bool  # the EMA LoRA draws the candidates and makes a third prediction
    shares_latents: (
        bool  # win and lose must start from one x_t: only branching transitions are used
    )


def gradspo_loss(
    predictions: NoisePredictions,
    pairs: PreferencePairs,
    schedule: DDIMSchedule,
    settings: LossSettings,
) -> LossOutput:
    """GradSPO: pull the prediction from the EMA's towards the win's noise, away from the lose's.

    With g = (z_win - z_lose) / 2 and lam = grad_scale sqrt(1 - abar_t) the targets are
    eps_ema -+ lam g; l is minus the mean squared error to them. Tee et al., NeurIPS 2025.
    """
    abar = schedule.abar(pairs.timesteps, pairs.noises[:, 0])
    shift = settings.grad_scale * (1 - abar).sqrt() * direction(pairs)
    win_target = predictions.ema[:, 0] - shift
    lose_target = predictions.ema[:, 0] + shift

    def likelihood(epsilon: Tensor, target: Tensor) -> Tensor:
        return -((epsilon[:, 0] - target) ** 2).flatten(1).mean(dim=1)

    return _preference_loss(
        likelihood(predictions.policy, win_target),
        likelihood(predictions.reference, win_target),
        likelihood(predictions.policy, lose_target),
        likelihood(predictions.reference, lose_target),
        settings,
    )


def direction(pairs: PreferencePairs) -> Tensor:
    """GradSPO's noise reduction g = (z_win - z_lose) / 2, (n, C, h, w)."""
    return (pairs.noises[:, 0] - pairs.noises[:, 1]) / 2


def spo_loss(
    predictions: NoisePredictions,
    pairs: PreferencePairs,
    schedule: DDIMSchedule,
    settings: LossSettings,
) -> LossOutput:
    """SPO: likelihood of each candidate's x_t' under the DDIM transition that the network predicts.

    Liang et al., CVPR 2025, arXiv 2406.04314.
    """

    def likelihood(epsilon: Tensor, candidate: int) -> Tensor:
        own = candidate if pairs.latents.shape[1] == 2 else 0
        latents, prediction = pairs.latents[:, own], epsilon[:, own]
        abar = schedule.abar(pairs.timesteps, latents)
        abar_previous = schedule.abar_previous(pairs.timesteps, latents)
        sigma = ddim.transition_std(abar, abar_previous, settings.eta)
        x0 = ddim.clip_x0(schedule, ddim.x0_from_epsilon(prediction, latents, abar))
        mean = ddim.transition_mean(x0, prediction, abar_previous, sigma)
        return ddim.gaussian_log_density(pairs.next_latents[:, candidate], mean, sigma)

    return _preference_loss(
        likelihood(predictions.policy, 0),
        likelihood(predictions.reference, 0),
        likelihood(predictions.policy, 1),
        likelihood(predictions.reference, 1),
        settings,
    )


def _preference_loss(
    win_policy: Tensor,
    win_reference: Tensor,
    lose_policy: Tensor,
    lose_reference: Tensor,
    settings: LossSettings,
) -> LossOutput:
    """Mean over pairs of -log sigmoid(beta (log r_win - log r_lose)), from log-likelihoods (n,)."""
    win, win_clipped = _clipped_log_ratio(win_policy - win_reference, settings.clip_eps)
    lose, lose_clipped = _clipped_log_ratio(lose_policy - lose_reference, settings.clip_eps)
    return LossOutput(
        loss=-F.logsigmoid(settings.beta * (win - lose)).mean(),
        win_policy=win_policy.detach(),
        win_reference=win_reference.detach(),
        lose_policy=lose_policy.detach(),
        lose_reference=lose_reference.detach(),
        win_ratio=win.detach().exp(),
        lose_ratio=lose.detach().exp(),
        clipped=(win_clipped.float() + lose_clipped.float()) / 2,
    )


def _clipped_log_ratio(difference: Tensor, clip_eps: float | None) -> tuple[Tensor, Tensor]:
    """log clip(exp d, 1 - clip_eps, 1 + clip_eps) without ever forming exp d, and where it clips."""
    if clip_eps is None:
        return difference, torch.zeros_like(difference, dtype=torch.bool)
    low, high = math.log1p(-clip_eps), math.log1p(clip_eps)
    return difference.clamp(low, high), (difference < low) | (difference > high)


LOSSES: dict[str, Objective] = {
    "gradspo": Objective(gradspo_loss, uses_ema=True, shares_latents=True),
    "spo": Objective(spo_loss, uses_ema=False, shares_latents=False),
}
