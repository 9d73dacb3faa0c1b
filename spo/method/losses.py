"""The losses: a loss owns its parameters and maps predictions and pairs to a number.

A loss of your own is a class like `GradSPO`, named "module:name" in `config.algorithm`. Its parameters
are filled by name from `config.train`, further ones from `config.train.loss_kwargs`.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.command_line.values import Checked, number, positive
from spo.errors import UserError
from spo.method.ddim import DDIM
from spo.plugins import find
from spo.types import LossOutput, NoisePredictions, PreferencePairs


class Loss(Protocol):
    """A loss, and what the training loop must provide for it."""

    uses_ema: bool  # the EMA LoRA draws the candidates and makes a third prediction
    shares_latents: bool  # win and lose must start from one x_t

    def __call__(
        self, predictions: NoisePredictions, pairs: PreferencePairs, sampler: DDIM
    ) -> LossOutput:
        """Returns the loss of n pairs, with gradients, and its terms without."""


def _clip_eps() -> Any:
    return number("above 0 and below 1, or None", lambda v: 0 < v < 1)


@dataclass(frozen=True)
class GradSPO(Checked, section="train"):
    """Pulls the prediction from the EMA's towards the win's noise, away from the lose's.

    With g = (z_win - z_lose) / 2 and lam = grad_scale sqrt(1 - abar_t) the targets are
    eps_ema -+ lam g; l is minus the mean squared error to them. Tee et al., NeurIPS 2025.
    """

    beta: float = positive()
    clip_eps: float | None = _clip_eps()
    grad_scale: float = positive()
    uses_ema: ClassVar[bool] = True
    shares_latents: ClassVar[bool] = True

    def __call__(
        self, predictions: NoisePredictions, pairs: PreferencePairs, sampler: DDIM
    ) -> LossOutput:
        level = sampler.noise_level(pairs.timesteps, pairs.noises[:, 0])
        shift = self.grad_scale * level * direction(pairs)
        win_target = predictions.ema[:, 0] - shift
        lose_target = predictions.ema[:, 0] + shift

        def likelihood(epsilon: Tensor, target: Tensor) -> Tensor:
            return -((epsilon[:, 0] - target) ** 2).flatten(1).mean(dim=1)

        return preference_loss(
            likelihood(predictions.policy, win_target),
            likelihood(predictions.reference, win_target),
            likelihood(predictions.policy, lose_target),
            likelihood(predictions.reference, lose_target),
            self.beta,
            self.clip_eps,
        )


@dataclass(frozen=True)
class SPO(Checked, section="train"):
    """Raises the likelihood of the win's x_t' under the transition from x_t, lowers the lose's.

    Liang et al., CVPR 2025, arXiv 2406.04314.
    """

    beta: float = positive()
    clip_eps: float | None = _clip_eps()
    uses_ema: ClassVar[bool] = False
    shares_latents: ClassVar[bool] = False

    def __call__(
        self, predictions: NoisePredictions, pairs: PreferencePairs, sampler: DDIM
    ) -> LossOutput:
        def likelihood(epsilon: Tensor, candidate: int) -> Tensor:
            own = candidate if pairs.latents.shape[1] == 2 else 0
            prediction = sampler.of_epsilon(epsilon[:, own], pairs.latents[:, own], pairs.timesteps)
            return sampler.log_density(
                pairs.next_latents[:, candidate], prediction, pairs.timesteps
            )

        return preference_loss(
            likelihood(predictions.policy, 0),
            likelihood(predictions.reference, 0),
            likelihood(predictions.policy, 1),
            likelihood(predictions.reference, 1),
            self.beta,
            self.clip_eps,
        )


# LPO (arXiv 2502.01051) is SPO's loss on pairs that a latent reward model chose.
LOSSES: dict[str, Callable[..., Loss]] = {"gradspo": GradSPO, "spo": SPO, "lpo": SPO}


def make_loss(algorithm: str, train: Mapping[str, Any], loss_kwargs: Mapping[str, Any]) -> Loss:
    """Returns the loss that `config.algorithm` names, with its parameters.

    They are entries of `config.train` of the same name, and those of `loss_kwargs`. Raises UserError
    if the loss lacks a parameter, or does not know one of `loss_kwargs`.
    """
    factory = find(algorithm, LOSSES, "algorithm")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:  # not callable, or a builtin
        raise UserError(
            f"algorithm: {algorithm} is not a class of losses; see spo/method/losses.py."
        ) from error
    own = {name: train[name] for name in signature.parameters if name in train}
    try:
        signature.bind(**own, **loss_kwargs)
    except TypeError as error:
        raise UserError(
            f"train.loss_kwargs: the parameters of {algorithm} are {', '.join(signature.parameters)}; "
            f"{error}."
        ) from error
    loss = factory(**own, **loss_kwargs)
    for name in ("uses_ema", "shares_latents"):
        if not isinstance(getattr(loss, name, None), bool):
            raise UserError(f"algorithm: {algorithm} must say {name} = True or False.")
    return loss


def direction(pairs: PreferencePairs) -> Tensor:
    """Returns GradSPO's noise reduction g = (z_win - z_lose) / 2, (n, C, h, w)."""
    return (pairs.noises[:, 0] - pairs.noises[:, 1]) / 2


def preference_loss(
    win_policy: Tensor,
    win_reference: Tensor,
    lose_policy: Tensor,
    lose_reference: Tensor,
    beta: float,
    clip_eps: float | None,
) -> LossOutput:
    """Returns the mean of -log sigmoid(beta (log r_win - log r_lose)), from log-likelihoods (n,)."""
    win, win_clipped = _clipped_log_ratio(win_policy - win_reference, clip_eps)
    lose, lose_clipped = _clipped_log_ratio(lose_policy - lose_reference, clip_eps)
    return LossOutput(
        loss=-F.logsigmoid(beta * (win - lose)).mean(),
        terms={
            "win_policy": win_policy.detach(),
            "win_reference": win_reference.detach(),
            "lose_policy": lose_policy.detach(),
            "lose_reference": lose_reference.detach(),
            "win_ratio": _ratio(win),
            "lose_ratio": _ratio(lose),
            # Share of the pair's two ratios: 0, 0.5 or 1.
            "clipped": (win_clipped.float() + lose_clipped.float()) / 2,
        },
    )


def _clipped_log_ratio(difference: Tensor, clip_eps: float | None) -> tuple[Tensor, Tensor]:
    """Returns log clip(exp d, 1 - clip_eps, 1 + clip_eps), without exp d, and whether it clips."""
    if clip_eps is None:
        return difference, torch.zeros_like(difference, dtype=torch.bool)
    low, high = math.log1p(-clip_eps), math.log1p(clip_eps)
    return difference.clamp(low, high), (difference < low) | (difference > high)


def _ratio(log_ratio: Tensor) -> Tensor:
    """Returns exp(log_ratio) without gradients, at most e^88, so that it fits fp32."""
    return log_ratio.detach().clamp(max=88).exp()
