"""Scores of candidates -> best against worst -> preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spo.types import Candidates, Conditioning, PreferencePairs, Transition


@dataclass(frozen=True)
class PairSettings:
    """Which pairs a comparison gives."""

    threshold: float  # sample.threshold
    keep_all_final: bool  # sample.keep_all_final
    direction_from_last: bool  # sample.final_direction == "last"
    branching_only: (
        bool  # only the window's first transition makes a pair (Objective.shares_latents)
    )
    one_x_t: bool  # win and lose of every pair share x_t, which is then kept once
    keep_predictions: bool  # the sampler's at x_t (train.ema_prediction == "rollout")


def preference_gap(scores: Tensor) -> Tensor:
    """How far apart softmax([best, worst]) lies, for scores (K, B): (B,) in [0, 1)."""
    best_and_worst = torch.stack([scores.amax(dim=0), scores.amin(dim=0)]).softmax(dim=0)
    return best_and_worst[0] - best_and_worst[1]


def differ_enough(candidates: Candidates, scores: Tensor, settings: PairSettings) -> Tensor:
    """Which of B comparisons make pairs, (B,) bool, by their scores (K, B)."""
    if candidates.is_final and settings.keep_all_final:
        return torch.ones_like(scores[0], dtype=torch.bool)
    return preference_gap(scores) > settings.threshold


def best_and_worst(scores: Tensor) -> Tensor:
    """Returns the best and the worst of K candidates, (B, 2) indices, by scores (K, B)."""
    return torch.stack([scores.argmax(dim=0), scores.argmin(dim=0)], dim=1)


def best_against_worst(
    candidates: Candidates,
    scores: Tensor,
    conditioning: Conditioning,
    prompt_ids: Tensor,
    settings: PairSettings,
) -> tuple[PreferencePairs, Tensor]:
    """The pairs of best and worst candidate of B prompts, and which of them differ enough, (n,) bool.

    Pairs come transition by transition of the window, within a transition prompt by prompt; scores
    are (K, B). All are returned, as to pick out some would wait for a GPU.
    """
    ranked = best_and_worst(scores)
    prompts = torch.arange(len(ranked), device=ranked.device)[:, None]

    def of_win_and_lose(values: Tensor) -> Tensor:  # (K, B, ...) -> (B, 2, ...)
        return values[ranked, prompts]

    def at_start(transition: Transition, values: Tensor) -> Tensor:
        if settings.one_x_t:
            return values[0].unsqueeze(1)
        return of_win_and_lose(values.expand_as(transition.noise))

    transitions = _transitions_used(candidates.window, settings)
    pairs = [
        PreferencePairs(
            timesteps=torch.full_like(prompt_ids, transition.timestep),
            latents=at_start(transition, transition.latents),
            noises=of_win_and_lose(transition.noise),
            next_latents=of_win_and_lose(transition.next_latents),
            prompt_ids=prompt_ids,
            conditioning=conditioning,
            sampler_epsilon=(
                at_start(transition, transition.epsilon) if settings.keep_predictions else None
            ),
        )
        for transition in transitions
    ]
    differ = differ_enough(candidates, scores, settings)
    return concatenate_pairs(pairs), differ.repeat(len(transitions))


def _transitions_used(
    window: tuple[Transition, ...], settings: PairSettings
) -> tuple[Transition, ...]:
    if not settings.branching_only:
        return window
    if settings.direction_from_last:
        return (replace(window[0], noise=window[-1].noise),)
    return window[:1]


def concatenate_pairs(parts: Sequence[PreferencePairs]) -> PreferencePairs:
    """All pairs of `parts` (at least one), in order."""
    first = parts[0]
    if len(parts) == 1:
        return first
    conditionings = [part.conditioning for part in parts]
    pooled = None
    if first.conditioning.pooled_prompt_embeds is not None:
        pooled = torch.cat([c.pooled_prompt_embeds for c in conditionings])
    return replace(
        first,
        **{name: torch.cat([part.tensors()[name] for part in parts]) for name in first.tensors()},
        conditioning=replace(
            first.conditioning,
            prompt_embeds=torch.cat([c.prompt_embeds for c in conditionings]),
            pooled_prompt_embeds=pooled,
        ),
    )


def no_pairs(
    conditioning: Conditioning, latent_shape: tuple[int, int, int], settings: PairSettings
) -> PreferencePairs:
    """No pairs, in the shapes of `best_against_worst`: what a process without prompts deals in."""
    device = conditioning.prompt_embeds.device
    none = torch.zeros(0, dtype=torch.int64, device=device)
    two = torch.zeros(0, 2, *latent_shape, device=device)
    start = two[:, :1] if settings.one_x_t else two
    return PreferencePairs(
        timesteps=none,
        latents=start,
        noises=two,
        next_latents=two,
        prompt_ids=none,
        conditioning=conditioning.select(slice(0)),
        sampler_epsilon=start if settings.keep_predictions else None,
    )
