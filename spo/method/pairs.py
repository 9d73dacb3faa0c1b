"""Scores of candidates -> a rule chooses winners and losers -> preference pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from spo.command_line.values import Checked, choice, number
from spo.errors import UserError
from spo.plugins import find
from spo.types import Candidates, Conditioning, PreferencePairs, Transition


@dataclass(frozen=True)
class Chosen:
    """n pairs chosen among K candidates of each of B prompts."""

    win: Tensor  # (n,) index of the preferred candidate
    lose: Tensor  # (n,) index of the dispreferred one
    prompts: Tensor  # (n,) index of the prompt

    def gap(self, scores: Tensor) -> Tensor:
        """Returns how far softmax([win, lose]) of scores (K, B) differ: (n,), from -1 to 1."""
        both = torch.stack([scores[self.win, self.prompts], scores[self.lose, self.prompts]])
        win, lose = both.softmax(dim=0)
        return win - lose


# (scores (K, B), generator on the CPU) -> the pairs, in the order in which training sees them
Pairing = Callable[[Tensor, torch.Generator], Chosen]


def best_worst(scores: Tensor, generator: torch.Generator) -> Chosen:
    """Pairs the best candidate of each prompt with its worst (SPO, arXiv 2406.04314)."""
    prompts = torch.arange(scores.shape[1], device=scores.device)
    return Chosen(scores.argmax(dim=0), scores.argmin(dim=0), prompts)


PAIRINGS: dict[str, Pairing] = {"best_worst": best_worst}

# Standard deviation of the DDIM transition from t = 50 k + 1 in 20 steps with eta 1, as the code of
# LPO (arXiv 2502.01051) rounds it; it looks these up whatever the steps and eta of the rollout are.
_SIGMA = (
    *(0.0206, 0.0406, 0.1673, 0.2144, 0.2509, 0.2836, 0.3144, 0.3442, 0.3732, 0.4016),
    *(0.4293, 0.4565, 0.4829, 0.5087, 0.5336, 0.5576, 0.5807, 0.6029, 0.6241, 0.6444),
)
_VARIANCE = tuple(round(sigma**2, 4) for sigma in _SIGMA)


def _share(table: Sequence[float], timestep: int) -> float:
    return (table[timestep // 50] - table[0]) / (table[-1] - table[0])


# Timestep -> share of the way from sample.threshold_min to threshold_max.
THRESHOLDS: dict[str, Callable[[int], float]] = {
    "sigma": partial(_share, _SIGMA),
    "variance": partial(_share, _VARIANCE),
    "linear": lambda timestep: (timestep - 1) / 950,
}


@dataclass(frozen=True)
class PairSettings(Checked, section="sample"):
    """Settings of the pairs of a comparison; `config.sample` explains each."""

    pairing: str
    threshold: float | None = number(
        "from 0 to 1, or -1 to keep every pair", lambda v: 0 <= v <= 1 or v == -1
    )
    threshold_schedule: str | None = choice(*THRESHOLDS)
    threshold_min: float | None = number("from 0 to 1", lambda v: 0 <= v <= 1)
    threshold_max: float | None = number("from 0 to 1", lambda v: 0 <= v <= 1)
    keep_all_final: bool
    final_direction: str = choice("window", "last")
    final_step: str
    num_inner_steps: int
    shares_latents: bool  # the loss needs one x_t: only a window's first transition makes pairs
    keep_predictions: bool  # keep the sampler's epsilon (train.ema_prediction == "rollout")

    def __post_init__(self) -> None:
        super().__post_init__()
        find(self.pairing, PAIRINGS, "sample.pairing")
        ends = (self.threshold_min, self.threshold_max)
        if self.threshold_schedule is None:
            if self.threshold is None or ends != (None, None):
                raise UserError(
                    "sample.threshold_schedule: without one, sample.threshold is a number, and "
                    "threshold_min and threshold_max are None."
                )
        elif self.threshold is not None or None in ends:
            raise UserError(
                f"sample.threshold: the {self.threshold_schedule} schedule goes from "
                "sample.threshold_min to threshold_max; set these two, and threshold to None."
            )

    def threshold_at(self, timestep: int) -> float:
        """Returns the gap above which candidates drawn at a timestep make a pair."""
        if self.threshold_schedule is None:
            return self.threshold
        share = THRESHOLDS[self.threshold_schedule](timestep)
        return self.threshold_min + (self.threshold_max - self.threshold_min) * share

    @property
    def one_x_t(self) -> bool:
        """True if win and lose of every pair share x_t, which is then kept once."""
        one_transition = self.num_inner_steps == 0 and self.final_step == "branch"
        return self.shares_latents or one_transition


def choose(scores: Tensor, settings: PairSettings, generator: torch.Generator) -> Chosen:
    """Returns the pairs that the rule of `settings` chooses by scores (K, B)."""
    return find(settings.pairing, PAIRINGS, "sample.pairing")(scores, generator)


def differ_enough(candidates: Candidates, gaps: Tensor, settings: PairSettings) -> Tensor:
    """Returns which of n chosen pairs are kept, (n,) bool, by their gaps (n,)."""
    noises_of = candidates.window[-1 if settings.final_direction == "last" else 0]
    if noises_of.timestep == 0:  # leads to itself: sigma is 0, and the noises changed nothing
        return torch.zeros_like(gaps, dtype=torch.bool)
    if candidates.is_final and settings.keep_all_final:
        return torch.ones_like(gaps, dtype=torch.bool)
    return gaps > settings.threshold_at(candidates.window[0].timestep)


def make_pairs(
    candidates: Candidates,
    chosen: Chosen,
    conditioning: Conditioning,
    prompt_ids: Tensor,
    settings: PairSettings,
) -> PreferencePairs:
    """Returns the chosen pairs, transition by transition of the window, as m n rows.

    Pairs below the threshold are among them: indexing here would wait for the GPU.
    """
    both = torch.stack([chosen.win, chosen.lose], dim=1)  # (n, 2)
    prompts = chosen.prompts[:, None]

    def of_win_and_lose(values: Tensor) -> Tensor:  # (K, B, ...) -> (n, 2, ...)
        return values[both, prompts]

    def at_start(transition: Transition, values: Tensor) -> Tensor:
        if settings.one_x_t:
            return values[0, chosen.prompts].unsqueeze(1)
        return of_win_and_lose(values.expand_as(transition.noise))

    own_ids, own_conditioning = prompt_ids[chosen.prompts], conditioning.select(chosen.prompts)
    pairs = [
        PreferencePairs(
            timesteps=torch.full_like(own_ids, transition.timestep),
            latents=at_start(transition, transition.latents),
            noises=of_win_and_lose(transition.noise),
            next_latents=of_win_and_lose(transition.next_latents),
            prompt_ids=own_ids,
            conditioning=own_conditioning,
            sampler_epsilon=(
                at_start(transition, transition.epsilon) if settings.keep_predictions else None
            ),
        )
        for transition in transitions_used(candidates.window, settings)
    ]
    return concatenate_pairs(pairs)


def transitions_used(
    window: tuple[Transition, ...], settings: PairSettings
) -> tuple[Transition, ...]:
    """Returns the transitions of a window that make pairs."""
    if not settings.shares_latents:
        return window
    if settings.final_direction == "last":
        return (replace(window[0], noise=window[-1].noise),)
    return window[:1]


def concatenate_pairs(parts: Sequence[PreferencePairs]) -> PreferencePairs:
    """Joins all pairs of `parts` (at least one), in order."""
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
    """Returns 0 pairs in the shapes of `make_pairs`, for a process without prompts."""
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
