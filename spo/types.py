"""The values that the stages of a training iteration hand on.

Letters in shapes: B prompts, K candidates, n pairs, (C, h, w) one latent, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """The UNet's text input for B prompts."""

    prompt_embeds: Tensor  # (B, L, D)
    negative_prompt_embeds: Tensor  # (1, L, D), the same for every prompt
    pooled_prompt_embeds: Tensor | None = None  # (B, P), SDXL only
    negative_pooled_prompt_embeds: Tensor | None = None  # (1, P), SDXL only
    time_ids: Tensor | None = None  # (1, 6), SDXL only

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def select(self, index: Tensor | slice) -> Conditioning:
        """Returns the conditioning of the prompts at `index`, in that order."""
        return self.map_rows(lambda rows: rows[index])

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Applies `change` to every tensor with one row per prompt."""
        pooled = self.pooled_prompt_embeds
        return replace(
            self,
            prompt_embeds=change(self.prompt_embeds),
            pooled_prompt_embeds=None if pooled is None else change(pooled),
        )


@dataclass(frozen=True)
class Prediction:
    """The network's guided prediction at latents (n, C, h, w), or (K, B, C, h, w) of candidates."""

    x0: Tensor  # shaped as the latents
    epsilon: Tensor  # likewise

    def per_candidate(self, k: int) -> Prediction:
        """Turns rows (K B, ...) into (K, B, ...)."""
        return Prediction(self.x0.unflatten(0, (k, -1)), self.epsilon.unflatten(0, (k, -1)))

    def select(self, candidates: Tensor, prompts: Tensor) -> Prediction:
        """Returns one candidate (B,) of each prompt (B,), as (1, B, ...)."""
        chosen = (part[candidates, prompts] for part in (self.x0, self.epsilon))
        return Prediction(*(part.unsqueeze(0) for part in chosen))


@dataclass(frozen=True)
class Transition:
    """One transition x_t -> x_t' of every candidate."""

    timestep: int  # t
    next_timestep: int  # t'
    latents: Tensor  # x_t: (K, B, C, h, w), or (1, B, C, h, w) if the candidates share it
    noise: Tensor  # z: (K, B, C, h, w)
    next_latents: Tensor  # x_t': (K, B, C, h, w)
    epsilon: Tensor  # the sampler's guided prediction at x_t, shaped as `latents`


@dataclass(frozen=True)
class Candidates:
    """K candidates per prompt, ready to be compared, with the transitions that made them."""

    window: tuple[Transition, ...]  # the branching transition, then inner steps
    # (K, B, C, h, w) to be decoded: predicted x0, or the final latents; None if there is no prediction.
    latents: Tensor | None
    score_timestep: int  # timestep that a scorer of images is told
    is_final: bool  # the rollout's last


@dataclass(frozen=True)
class Comparison:
    """The scores of one comparison of a rollout."""

    score_timestep: int  # timestep that the scorer was told
    scores: Tensor  # (K, B)
    gaps: Tensor  # (n,) by which the n pairs of candidates that were chosen differ, see pairs.py


@dataclass(frozen=True)
class PreferencePairs:
    """n pairs of a preferred (win) and a dispreferred (lose) transition."""

    timesteps: Tensor  # (n,) int64
    latents: Tensor  # x_t: (n, 1, C, h, w) shared by win and lose, or (n, 2, C, h, w)
    noises: Tensor  # z of win and lose: (n, 2, C, h, w)
    next_latents: Tensor  # x_t' of win and lose: (n, 2, C, h, w)
    prompt_ids: Tensor  # (n,) int64, index of the prompt in the training set
    conditioning: Conditioning  # of n rows
    # The sampler's guided prediction at x_t, shaped as `latents`; None if it was not kept.
    sampler_epsilon: Tensor | None = None

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    def select(self, index: Tensor | slice) -> PreferencePairs:
        """Returns the pairs at `index`, in that order."""
        return self.map_rows(lambda rows: rows[index])

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> PreferencePairs:
        """Applies `change` to every tensor with one row per pair."""
        changed = {name: change(rows) for name, rows in self.tensors().items()}
        return replace(self, **changed, conditioning=self.conditioning.map_rows(change))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the fields with one row per pair, without the conditioning."""
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
    """The loss of a minibatch of n pairs."""

    loss: Tensor  # () carries gradients
    # (n,) without gradients: numbers of each pair, by their names in metrics.jsonl. A number that is
    # not finite stops the run.
    terms: Mapping[str, Tensor]
