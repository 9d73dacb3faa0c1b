"""What the stages of a training iteration exchange.

Letters in shapes: B prompts, K candidates, n pairs, (C, h, w) one latent, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about each of B prompts."""

    prompt_embeds: Tensor  # (B, L, D)
    negative_prompt_embeds: Tensor  # (1, L, D), the same for every prompt
    pooled_prompt_embeds: Tensor | None = None  # (B, P), SDXL only
    negative_pooled_prompt_embeds: Tensor | None = None  # (1, P), SDXL only
    time_ids: Tensor | None = None  # (1, 6), SDXL only

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def select(self, index: Tensor | slice) -> Conditioning:
        """Conditioning of the prompts at `index`, in that order."""
        return self.map_rows(lambda rows: rows[index])

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """`change` applied to every tensor with one row per prompt."""
        pooled = self.pooled_prompt_embeds
        return replace(
            self,
            prompt_embeds=change(self.prompt_embeds),
            pooled_prompt_embeds=None if pooled is None else change(pooled),
        )

    def repeat(self, times: int) -> Conditioning:
        """All prompts, `times` over: row k B + b is prompt b."""
        rows = torch.arange(len(self), device=self.prompt_embeds.device)
        return self.select(rows.repeat(times))


@dataclass(frozen=True)
class Transition:
    """One DDIM transition x_t -> x_t' of every candidate."""

    timestep: int  # t
    latents: Tensor  # x_t: (K, B, C, h, w), or (1, B, C, h, w) where the candidates share it
    noise: Tensor  # z: (K, B, C, h, w)
    next_latents: Tensor  # x_t': (K, B, C, h, w)
    epsilon: Tensor  # the sampler's guided prediction at x_t, shaped as `latents`


@dataclass(frozen=True)
class Candidates:
    """K candidates per prompt, ready to be compared, with the transitions that made them."""

    window: tuple[Transition, ...]  # the branching transition, then inner steps
    latents: Tensor  # (K, B, C, h, w), what to decode: predicted x0, or the final latents
    score_timestep: int  # timestep that the preference model is told
    is_final: bool  # `latents` are final, not a prediction


@dataclass(frozen=True)
class PreferencePairs:
    """n pairs of a preferred (win) and a dispreferred (lose) transition."""

    timesteps: Tensor  # (n,) int64
    latents: Tensor  # x_t: (n, 1, C, h, w) shared by win and lose, or (n, 2, C, h, w)
    noises: Tensor  # z of win and lose: (n, 2, C, h, w)
    next_latents: Tensor  # x_t' of win and lose: (n, 2, C, h, w)
    prompt_ids: Tensor  # (n,) int64, index of the prompt in the training set
    conditioning: Conditioning  # of n rows
    # The sampler's guided prediction at x_t, shaped as `latents`; None where it was not kept.
    sampler_epsilon: Tensor | None = None

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    def select(self, index: Tensor | slice) -> PreferencePairs:
        """The pairs at `index`, in that order."""
        return self.map_rows(lambda rows: rows[index])

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> PreferencePairs:
        """`change` applied to every tensor with one row per pair."""
        changed = {name: change(rows) for name, rows in self.tensors().items()}
        return replace(self, **changed, conditioning=self.conditioning.map_rows(change))

    def tensors(self) -> dict[str, Tensor]:
        """The fields with one row per pair, without the conditioning."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class NoisePredictions:
    """Guided epsilon predictions of the three networks at the pairs' x_t."""

    policy: Tensor  # (n, 1 or 2, C, h, w), as PreferencePairs.latents; carries gradients
    reference: Tensor  # likewise, without gradients
    ema: Tensor | None  # likewise; None for a loss without EMA


@dataclass(frozen=True)
class LossOutput:
    """The loss of a minibatch and what it was made of; only `loss` carries gradients."""

    loss: Tensor  # ()
    win_policy: Tensor  # (n,) log-likelihood term l_win(policy)
    win_reference: Tensor  # (n,)
    lose_policy: Tensor  # (n,)
    lose_reference: Tensor  # (n,)
    win_ratio: Tensor  # (n,) likelihood ratio after clipping
    lose_ratio: Tensor  # (n,)
    clipped: Tensor  # (n,) share of the pair's two ratios that were clipped: 0, 0.5 or 1
