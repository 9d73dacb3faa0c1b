"""The stepwise rollout: at every denoising step draw K candidates, compare, go on from one of them.

No gradients, no scores: which candidate goes on is drawn uniformly (SPO, arXiv 2406.04314, sec. 3),
so the rollout runs ahead of the preference model and yields what is to be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spo import ddim
from spo.ddim import DDIMSchedule
from spo.errors import UserError
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


@torch.no_grad()
def stepwise_rollout(
    predict: Predict,
    schedule: DDIMSchedule,
    settings: RolloutSettings,
    conditioning: Conditioning,
    latent_shape: tuple[int, int, int],
    generator: torch.Generator,
) -> Iterator[Candidates]:
    """Roll out B prompts and yield their candidates, comparison by comparison.

    The generator lives on the CPU, so that a seed means the same on every device. The order in which
    it is drawn from is part of the contract: initial latents (B, C, h, w); (B, C, h, w) per step
    before branching; (K, B, C, h, w) at the first branch; at each later branch the index that goes on
    (B,), then (K, B, C, h, w); (K B, C, h, w) per inner step.
    """
    k, b = settings.num_candidates, conditioning.prompt_embeds.shape[0]
    device = conditioning.prompt_embeds.device
    of_candidates = conditioning.repeat(k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def x0_and_epsilon(latents: Tensor, timestep: int, rows: Conditioning) -> tuple[Tensor, Tensor]:
        output = predict(latents, timestep, rows).float()
        abar = schedule.abar(timestep, latents)
        return (
            ddim.to_x0(schedule, output, latents, abar),
            ddim.to_epsilon(schedule, output, latents, abar),
        )

    def step(x0: Tensor, epsilon: Tensor, timestep: int, noise: Tensor) -> Tensor:
        abar, abar_previous = schedule.abar(timestep, x0), schedule.abar_previous(timestep, x0)
        sigma = ddim.transition_std(abar, abar_previous, settings.eta)
        return ddim.transition_mean(x0, epsilon, abar_previous, sigma) + sigma * noise

    def per_candidate(rows: Tensor) -> Tensor:
        return rows.reshape(k, b, *latent_shape)

    latents = draw(b, *latent_shape)
    for timestep in schedule.timesteps[: settings.branch_from]:
        x0, epsilon = x0_and_epsilon(latents, timestep, conditioning)
        latents = step(x0, epsilon, timestep, draw(b, *latent_shape))

    window: tuple[Transition, ...] = ()
    last = schedule.timesteps[-1]
    for timestep in schedule.timesteps[settings.branch_from :]:
        if not window:  # the first branch
            x0, epsilon = x0_and_epsilon(latents, timestep, conditioning)
        else:
            ends = window[-1].next_latents.flatten(0, 1)
            x0, epsilon = x0_and_epsilon(ends, timestep, of_candidates)
            window_is_full = len(window) > settings.num_inner_steps
            if not window_is_full or (timestep == last and settings.extend_final):
                noise = draw(k * b, *latent_shape)
                window += (
                    Transition(
                        timestep=timestep,
                        latents=window[-1].next_latents,
                        noise=per_candidate(noise),
                        next_latents=per_candidate(step(x0, epsilon, timestep, noise)),
                    ),
                )
                continue
            yield Candidates(window, per_candidate(x0), timestep, is_final=False)
            goes_on = torch.randint(0, k, (b,), generator=generator).to(device)
            of_prompt = torch.arange(b, device=device)
            latents = window[-1].next_latents[goes_on, of_prompt]
            x0 = per_candidate(x0)[goes_on, of_prompt]
            epsilon = per_candidate(epsilon)[goes_on, of_prompt]
        noise = draw(k, b, *latent_shape)
        branched = step(x0, epsilon, timestep, noise)  # (B, ...) broadcast over the K noises
        window = (Transition(timestep, latents.unsqueeze(0), noise, branched),)

    score_timestep = last if settings.final_score_timestep == "t" else 0
    yield Candidates(window, window[-1].next_latents, score_timestep, is_final=True)
