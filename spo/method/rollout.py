"""The stepwise rollout: at every denoising step draw K candidates, compare, continue from one.

No gradients, no scores: the candidate that continues is drawn uniformly (SPO, arXiv 2406.04314,
sec. 3), so the rollout runs ahead of the scorer and yields the candidates to be compared. A scorer of
images compares what the next step predicts of each candidate (SPO, GradSPO); a scorer of latents
compares the noisy candidates as soon as they are drawn (LPO, arXiv 2502.01051).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.command_line.values import Checked, choice, not_negative
from spo.errors import UserError
from spo.method.ddim import DDIM
from spo.types import Candidates, Conditioning, Prediction, Transition

# (latents (n, C, h, w), timestep, conditioning of n rows) -> guided model output (n, C, h, w)
Network = Callable[[Tensor, int, Conditioning], Tensor]


@dataclass(frozen=True)
class RolloutSettings(Checked, section="sample"):
    """The shape of a rollout; `config.sample` explains each.

    Raises UserError unless at least one comparison fits into `num_steps` steps.
    """

    looks_at: str  # the scorer's "images" or "latents"
    num_steps: int
    num_candidates: int
    branch_from: int
    num_inner_steps: int
    stop_at: int = not_negative()
    final_step: str = choice("branch", "extend")
    final_score_timestep: str = choice("zero", "t")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_candidates < 2:
            raise UserError(
                f"sample.num_candidates: {self.num_candidates} candidates cannot be compared; use 2 or "
                "more."
            )
        last = self.num_steps - (2 if self.final_step == "extend" else 1)
        if not 0 <= self.branch_from <= last:
            raise UserError(
                f"sample.branch_from: {self.branch_from} is outside the schedule; with "
                f"sample.num_steps={self.num_steps} it must be from 0 to {last}."
            )
        left = self.num_steps - self.branch_from - 1
        if not 0 <= self.num_inner_steps <= left:
            raise UserError(
                f"sample.num_inner_steps: {self.num_inner_steps} is not from 0 to {left}, the steps "
                f"left after sample.branch_from={self.branch_from} of {self.num_steps}."
            )
        if self.stop_at and not self.branch_from < self.stop_at <= self.num_steps:
            raise UserError(
                f"sample.stop_at: {self.stop_at} must be above sample.branch_from={self.branch_from} "
                f"and at most sample.num_steps={self.num_steps}; 0 takes all steps."
            )


@torch.no_grad()
def stepwise_rollout(
    network: Network,
    sampler: DDIM,
    settings: RolloutSettings,
    conditioning: Conditioning,
    latent_shape: tuple[int, int, int],
    generator: torch.Generator,
) -> Iterator[Candidates]:
    """Rolls out B prompts and yields their candidates, comparison by comparison.

    The generator lives on the CPU, so that a seed means the same on every device. Its draws and their
    order are part of the contract: initial latents (B, C, h, w); (B, C, h, w) per step before
    branching; (K, B, C, h, w) at the first branch; at each later branch the candidate that continues
    (B,), then (K, B, C, h, w); (K B, C, h, w) per inner step. A scorer of latents leaves the candidate
    that continues to be drawn right after each comparison, the last included.
    """
    walk = _Walk(network, sampler, latent_shape, generator, conditioning.prompt_embeds.device)
    latents = walk.draw(1, len(conditioning))
    for timestep in sampler.timesteps[: settings.branch_from]:
        prediction = walk.predict(latents, timestep, conditioning)
        latents = sampler.step(prediction, timestep, walk.draw(1, len(conditioning)))
    branch = _compare_drawn if settings.looks_at == "latents" else _compare_predicted
    yield from branch(walk, settings, conditioning, latents)


def _compare_drawn(
    walk: _Walk, settings: RolloutSettings, conditioning: Conditioning, latents: Tensor
) -> Iterator[Candidates]:
    """Branches from `latents` (1, B, C, h, w); yields noisy candidates in the step that draws them.

    The network sees B rows a step.
    """
    k, b = settings.num_candidates, len(conditioning)
    prompts = torch.arange(b, device=walk.device)
    timesteps = walk.sampler.timesteps[: settings.stop_at or None]
    for timestep in timesteps[settings.branch_from :]:
        prediction = walk.predict(latents, timestep, conditioning)
        drawn = walk.transition(latents, prediction, timestep, walk.draw(k, b))
        is_final = timestep == timesteps[-1]
        yield Candidates((drawn,), None, drawn.next_timestep, is_final)
        latents = drawn.next_latents[walk.choose(k, b), prompts].unsqueeze(0)


def _compare_predicted(
    walk: _Walk, settings: RolloutSettings, conditioning: Conditioning, latents: Tensor
) -> Iterator[Candidates]:
    """Branches from `latents` (1, B, C, h, w); yields candidates once the next step has predicted x0.

    That step runs the network on K B rows, and one of the candidates goes on with its own prediction.
    """
    k, b, sampler = settings.num_candidates, len(conditioning), walk.sampler
    prompts = torch.arange(b, device=walk.device)
    of_candidates = conditioning.select(prompts.repeat(k))  # row k B + b is prompt b
    window: tuple[Transition, ...] = ()
    for timestep in sampler.timesteps[settings.branch_from :]:
        if not window:
            prediction = walk.predict(latents, timestep, conditioning)
        else:
            ends = window[-1].next_latents
            candidates = walk.predict(ends, timestep, of_candidates)
            extends_last = settings.final_step == "extend" and timestep == sampler.timesteps[-1]
            if len(window) <= settings.num_inner_steps or extends_last:
                window += (walk.transition(ends, candidates, timestep, walk.draw(k, b)),)
                continue
            yield Candidates(window, candidates.x0, timestep, is_final=False)
            chosen = walk.choose(k, b)
            latents = ends[chosen, prompts].unsqueeze(0)
            prediction = candidates.select(chosen, prompts)
        window = (walk.transition(latents, prediction, timestep, walk.draw(k, b)),)

    score_timestep = sampler.timesteps[-1] if settings.final_score_timestep == "t" else 0
    yield Candidates(window, window[-1].next_latents, score_timestep, is_final=True)


@dataclass(frozen=True)
class _Walk:
    """The denoising of B prompts: latents, noises and predictions are (K, B, C, h, w), or K = 1."""

    network: Network
    sampler: DDIM
    latent_shape: tuple[int, int, int]
    generator: torch.Generator
    device: torch.device

    def draw(self, k: int, b: int) -> Tensor:
        """Draws standard normal latents (k, b, C, h, w)."""
        noise = torch.randn(k * b, *self.latent_shape, generator=self.generator)
        return _to(self.device, noise).unflatten(0, (k, b))

    def choose(self, k: int, b: int) -> Tensor:
        """Draws the candidate of each prompt that continues, (b,)."""
        return _to(self.device, torch.randint(0, k, (b,), generator=self.generator))

    def predict(self, latents: Tensor, timestep: int, rows: Conditioning) -> Prediction:
        """Returns the network's prediction at the latents."""
        flat = latents.flatten(0, 1)
        output = self.network(flat, timestep, rows).float()
        return self.sampler.predict(output, flat, timestep).per_candidate(len(latents))

    def transition(
        self, latents: Tensor, prediction: Prediction, timestep: int, noise: Tensor
    ) -> Transition:
        """Makes one transition for each noise."""
        drawn, following = (
            self.sampler.step(prediction, timestep, noise),
            self.sampler.next(timestep),
        )
        return Transition(timestep, following, latents, noise, drawn, prediction.epsilon)


def _to(device: torch.device, drawn: Tensor) -> Tensor:
    """Moves `drawn` to `device` without waiting for the work that a GPU still has to do."""
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)
