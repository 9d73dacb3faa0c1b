"""The stepwise rollout: at every denoising step draw K candidates, compare, go on from one of them.

No gradients, no scores: which candidate goes on is drawn uniformly (SPO, arXiv 2406.04314, sec. 3),
so the rollout runs ahead of the preference model and yields what is to be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.errors import UserError
from spo.method import ddim
from spo.method.ddim import DDIMSchedule
from spo.types import Candidates, Conditioning, Transition

# (latents (n, C, h, w), timestep, conditioning of n rows) -> guided model output (n, C, h, w)
Predict = Callable[[Tensor, int, Conditioning], Tensor]


@dataclass(frozen=True)
class RolloutSettings:
    """The shape of a rollout; `config.sample` explains each."""

    num_candidates: int
    branch_from: int
    num_inner_steps: int
    eta: float
    extend_final: bool  # sample.final_step == "extend"
    final_score_timestep: str  # "zero" or "t"


def check_settings(settings: RolloutSettings, num_steps: int) -> None:
    """Raise UserError unless at least one comparison fits into `num_steps` steps."""
    if settings.num_candidates < 2:
        raise UserError(
            f"sample.num_candidates: {settings.num_candidates} candidates cannot be compared; "
            "use 2 or more."
        )
    last = num_steps - 2 if settings.extend_final else num_steps - 1
    if not 0 <= settings.branch_from <= last:
        raise UserError(
            f"sample.branch_from: {settings.branch_from} is outside the schedule; with "
            f"sample.num_steps={num_steps} it must be from 0 to {last}."
        )
    left = num_steps - settings.branch_from - 1
    if not 0 <= settings.num_inner_steps <= left:
        raise UserError(
            f"sample.num_inner_steps: {settings.num_inner_steps} is not from 0 to {left}, the steps "
            f"left after sample.branch_from={settings.branch_from} of {num_steps}."
        )


@dataclass(frozen=True)
class _Prediction:
    """What the network makes of latents: (n, C, h, w), or (K, B, C, h, w) for all candidates."""

    x0: Tensor
    epsilon: Tensor

    def per_candidate(self, k: int) -> _Prediction:
        """Rows (K B, ...) as (K, B, ...)."""
        return _Prediction(self.x0.unflatten(0, (k, -1)), self.epsilon.unflatten(0, (k, -1)))

    def select(self, candidates: Tensor, prompts: Tensor) -> _Prediction:
        """One candidate (B,) of each prompt (B,)."""
        return _Prediction(self.x0[candidates, prompts], self.epsilon[candidates, prompts])


@dataclass(frozen=True)
class _Denoiser:
    """The sampler network and its DDIM transition."""

    network: Predict
    schedule: DDIMSchedule
    eta: float

    def predict(self, latents: Tensor, timestep: int, rows: Conditioning) -> _Prediction:
        output = self.network(latents, timestep, rows).float()
        abar = self.schedule.abar(timestep, latents)
        return _Prediction(
            ddim.to_x0(self.schedule, output, latents, abar),
            ddim.to_epsilon(self.schedule, output, latents, abar),
        )

    def step(self, prediction: _Prediction, timestep: int, noise: Tensor) -> Tensor:
        """x_t' for each noise; a prediction (B, ...) broadcasts over noises (K, B, ...)."""
        abar = self.schedule.abar(timestep, noise)
        abar_previous = self.schedule.abar_previous(timestep, noise)
        sigma = ddim.transition_std(abar, abar_previous, self.eta)
        mean = ddim.transition_mean(prediction.x0, prediction.epsilon, abar_previous, sigma)
        return mean + sigma * noise


@torch.no_grad()
def stepwise_rollout(
    network: Predict,
    schedule: DDIMSchedule,
    settings: RolloutSettings,
    conditioning: Conditioning,
    latent_shape: tuple[int, int, int],
    generator: torch.Generator,
) -> Iterator[Candidates]:
    """Roll out B prompts and yield their candidates, comparison by comparison.

    The generator lives on the CPU, so that a seed means the same on every device. What is drawn from
    it, and in which order, is part of the contract: initial latents (B, C, h, w); (B, C, h, w) per
    step before branching; (K, B, C, h, w) at the first branch; at each later branch the candidate
    that goes on (B,), then (K, B, C, h, w); (K B, C, h, w) per inner step.
    """
    k, b = settings.num_candidates, len(conditioning)
    device = conditioning.prompt_embeds.device
    of_candidates, prompts = conditioning.repeat(k), torch.arange(b, device=device)
    denoiser = _Denoiser(network, schedule, settings.eta)

    def draw(*rows: int) -> Tensor:
        return _to(device, torch.randn(*rows, *latent_shape, generator=generator))

    latents = draw(b)
    for timestep in schedule.timesteps[: settings.branch_from]:
        prediction = denoiser.predict(latents, timestep, conditioning)
        latents = denoiser.step(prediction, timestep, draw(b))

    window: tuple[Transition, ...] = ()
    last = schedule.timesteps[-1]
    for timestep in schedule.timesteps[settings.branch_from :]:
        if not window:
            prediction = denoiser.predict(latents, timestep, conditioning)
        else:
            ends = window[-1].next_latents
            rows = denoiser.predict(ends.flatten(0, 1), timestep, of_candidates)
            candidates = rows.per_candidate(k)
            is_full = len(window) > settings.num_inner_steps
            if not is_full or (timestep == last and settings.extend_final):
                noise = draw(k * b).unflatten(0, (k, b))
                next_latents = denoiser.step(candidates, timestep, noise)
                window += (Transition(timestep, ends, noise, next_latents, candidates.epsilon),)
                continue
            yield Candidates(window, candidates.x0, timestep, is_final=False)
            goes_on = _to(device, torch.randint(0, k, (b,), generator=generator))
            latents, prediction = ends[goes_on, prompts], candidates.select(goes_on, prompts)
        noise = draw(k, b)
        next_latents = denoiser.step(prediction, timestep, noise)
        shared, epsilon = latents.unsqueeze(0), prediction.epsilon.unsqueeze(0)
        window = (Transition(timestep, shared, noise, next_latents, epsilon),)

    score_timestep = last if settings.final_score_timestep == "t" else 0
    yield Candidates(window, window[-1].next_latents, score_timestep, is_final=True)


def _to(device: torch.device, drawn: Tensor) -> Tensor:
    """`drawn` on `device`, without waiting until a GPU has done all that it was given before."""
    if device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)
