"""The sampler: DDIM transitions and their density. The only file that knows alphas_cumprod.

Equations are those of Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502.
`abar` is `alphas_cumprod[t]`. A timestep is an int, or a tensor (n,) with one per row of the latents.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from spo.command_line.values import Checked, number
from spo.errors import UserError, first_line
from spo.plugins import find
from spo.types import Prediction

# (num_steps, alphas_cumprod (T,), the scheduler's steps_offset) -> num_steps timesteps, descending
Timesteps = Callable[[int, Tensor, int], Sequence[int]]


def leading(num_steps: int, alphas_cumprod: Tensor, steps_offset: int) -> list[int]:
    """Multiples of T // num_steps, plus the offset: 951, 901, ..., 1 for 20 steps of SD1.5."""
    stride = len(alphas_cumprod) // num_steps
    return [step * stride + steps_offset for step in reversed(range(num_steps))]


def trailing(num_steps: int, alphas_cumprod: Tensor, steps_offset: int) -> list[int]:
    """From T - 1 downwards: 999, 949, ..., 49 for 20 steps (Lin et al., arXiv 2305.08891)."""
    total = len(alphas_cumprod)
    return [round(total - step * total / num_steps) - 1 for step in range(num_steps)]


def linspace(num_steps: int, alphas_cumprod: Tensor, steps_offset: int) -> list[int]:
    """From T - 1 to 0 at equal distances: 999, 946, ..., 0 for 20 steps."""
    return np.linspace(0, len(alphas_cumprod) - 1, num_steps).round().astype(int)[::-1].tolist()


NUM_STEPS = "a whole number from 1 to 1000, the timesteps that models are trained with"
TIMESTEPS: dict[str, Timesteps] = {"leading": leading, "trailing": trailing, "linspace": linspace}
_KEY = "sample.timesteps"
MODEL = "model"  # the `timestep_spacing` of the base model's scheduler config


@dataclass(frozen=True)
class SamplerSettings(Checked, section="sample"):
    """Settings of the sampler; `config.sample` explains each."""

    num_steps: int = number(NUM_STEPS, lambda v: 1 <= v <= 1000)
    eta: float = number(
        "above 0 (at 0 all candidates are the same) and at most 1", lambda v: 0 < v <= 1
    )
    timesteps: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timesteps != MODEL:
            find(self.timesteps, TIMESTEPS, _KEY)


@dataclass(frozen=True)
class NoiseSchedule:
    """A base model's noise schedule, and the meaning of its output."""

    alphas_cumprod: Tensor  # (T,) fp32, on the device of the latents
    prediction_type: str  # "epsilon", "v_prediction" or "sample"
    clip_range: float | None  # clamp x0 to +- this
    threshold_ratio: float | None  # dynamic thresholding of x0: the quantile
    threshold_max: float  # the largest value that dynamic thresholding scales down from

    def abar(self, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """Returns alphas_cumprod: () at one timestep; at (n,) timesteps (n, 1, ...) as `like`."""
        values = self.alphas_cumprod[timesteps]
        return values.reshape(values.shape + (1,) * (like.ndim - 1)) if values.ndim else values

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """Returns x_t of `x0` and standard normal `noise` (eq. 4)."""
        abar = self.abar(timesteps, x0)
        return abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def noise_level(self, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """Returns sqrt(1 - abar), the standard deviation of the noise in x_t, shaped as `abar`."""
        return (1 - self.abar(timesteps, like)).sqrt()

    def predict(self, output: Tensor, latents: Tensor, timesteps: Tensor | int) -> Prediction:
        """Returns x0, clipped as configured, and epsilon of a model output of any prediction type."""
        abar = self.abar(timesteps, latents)
        if self.prediction_type == "epsilon":
            x0, epsilon = x0_from_epsilon(output, latents, abar), output
        elif self.prediction_type == "v_prediction":
            x0 = abar.sqrt() * latents - (1 - abar).sqrt() * output
            epsilon = abar.sqrt() * output + (1 - abar).sqrt() * latents
        else:
            x0, epsilon = output, (latents - abar.sqrt() * output) / (1 - abar).sqrt()
        return Prediction(self._bounded(x0), epsilon)

    def of_epsilon(self, epsilon: Tensor, latents: Tensor, timesteps: Tensor | int) -> Prediction:
        """Returns the prediction with this epsilon."""
        x0 = x0_from_epsilon(epsilon, latents, self.abar(timesteps, latents))
        return Prediction(self._bounded(x0), epsilon)

    def _bounded(self, x0: Tensor) -> Tensor:
        if self.threshold_ratio is not None:
            return dynamic_threshold(x0, self.threshold_ratio, self.threshold_max)
        if self.clip_range is not None:
            return x0.clamp(-self.clip_range, self.clip_range)
        return x0


@dataclass(frozen=True)
class DDIM(NoiseSchedule):
    """The sampler: from x_t to the next latents x_t', where t' follows t in the list of timesteps."""

    timesteps: tuple[int, ...]  # num_steps timesteps, descending; the last one leads to t' = 0
    eta: float  # 0: deterministic, 1: as random as DDPM

    @cached_property
    def _next(self) -> dict[int, int]:
        return dict(zip(self.timesteps, (*self.timesteps[1:], 0), strict=True))

    @cached_property
    def _next_of(self) -> Tensor:
        """(T,) t' of each timestep; -1 where `timesteps` lacks it."""
        table = torch.full((len(self.alphas_cumprod),), -1)
        for timestep, next_timestep in self._next.items():
            table[timestep] = next_timestep
        return table.to(self.alphas_cumprod.device)

    def next(self, timesteps: Tensor | int) -> Tensor | int:
        """Returns t', the timestep that the transition from each timestep leads to."""
        if isinstance(timesteps, int):
            return self._next[timesteps]
        return self._next_of[timesteps]

    def step(self, prediction: Prediction, timesteps: Tensor | int, noise: Tensor) -> Tensor:
        """Returns x_t' (eq. 12); a prediction (B, ...) broadcasts over noises (K, B, ...)."""
        mean, sigma = self.transition(prediction, timesteps, noise)
        return mean + sigma * noise

    def log_density(
        self, next_latents: Tensor, prediction: Prediction, timesteps: Tensor
    ) -> Tensor:
        """Returns log p(x_t' | prediction) of latents (n, C, h, w), averaged over C, h, w: (n,)."""
        mean, sigma = self.transition(prediction, timesteps, next_latents)
        return gaussian_log_density(next_latents, mean, sigma)

    def transition(
        self, prediction: Prediction, timesteps: Tensor | int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of x_t', the latter shaped as `abar`."""
        abar, abar_next = self.abar(timesteps, like), self.abar(self.next(timesteps), like)
        sigma = transition_std(abar, abar_next, self.eta)
        return transition_mean(prediction.x0, prediction.epsilon, abar_next, sigma), sigma


def ddim_scheduler(scheduler_config: Mapping[str, Any]) -> DDIMScheduler:
    """Returns diffusers' DDIM made from a base model's own scheduler config.

    Raises ValueError for a prediction, betas or timesteps that DDIM does not know.
    """
    # A foreign config (PNDM, Euler, DPM-Solver) may lack DDIM's own `clip_sample`, whose default in
    # diffusers is to clamp x0 to [-1, 1]: right for pixels, ruin for latents.
    try:
        scheduler = DDIMScheduler.from_config({"clip_sample": False, **scheduler_config})
    except Exception as error:  # whatever the constructor raises for nonsense
        raise ValueError(f"its scheduler has no noise schedule: {first_line(error)}") from error
    prediction, spacing = scheduler.config.prediction_type, scheduler.config.timestep_spacing
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"its scheduler's prediction_type is {prediction!r}")
    if spacing not in TIMESTEPS:
        raise ValueError(f"its scheduler's timestep_spacing is {spacing!r}")
    return scheduler


def noise_schedule(
    scheduler_config: Mapping[str, Any], device: torch.device | str = "cpu"
) -> NoiseSchedule:
    """Returns the noise schedule that a base model's own scheduler config describes."""
    return _noise_of(ddim_scheduler(scheduler_config), device)


def _noise_of(scheduler: DDIMScheduler, device: torch.device | str = "cpu") -> NoiseSchedule:
    config = scheduler.config
    return NoiseSchedule(
        alphas_cumprod=scheduler.alphas_cumprod.to(device, torch.float32),
        prediction_type=config.prediction_type,
        # Thresholding takes precedence over clipping, as in diffusers.
        clip_range=config.clip_sample_range if config.clip_sample else None,
        threshold_ratio=config.dynamic_thresholding_ratio if config.thresholding else None,
        threshold_max=config.sample_max_value,
    )


def make_sampler(
    scheduler_config: Mapping[str, Any],
    num_steps: int,
    eta: float,
    timesteps: str = MODEL,
    device: torch.device | str = "cpu",
) -> DDIM:
    """Returns the DDIM sampler of `num_steps` steps made from a base model's own scheduler config.

    `timesteps` is MODEL, an entry of TIMESTEPS or "module:name". Raises UserError if the steps do not
    fit the model's training timesteps.
    """
    scheduler = ddim_scheduler(scheduler_config)
    noise, config = _noise_of(scheduler), scheduler.config
    total = len(noise.alphas_cumprod)
    if not 1 <= num_steps <= total:
        raise UserError(f"sample.num_steps, eval.num_steps: {num_steps} is not from 1 to {total}.")
    timesteps = config.timestep_spacing if timesteps == MODEL else timesteps
    schedule = find(timesteps, TIMESTEPS, _KEY)
    chosen = tuple(map(int, schedule(num_steps, noise.alphas_cumprod, config.steps_offset)))
    if chosen and chosen[0] >= total:
        raise UserError(
            f"sample.num_steps, eval.num_steps: {num_steps} steps begin at t = {chosen[0]}, beyond the "
            f"model's {total} timesteps; use fewer."
        )
    if len(chosen) != num_steps or chosen[-1] < 0 or list(chosen) != sorted(set(chosen))[::-1]:
        raise UserError(
            f"{_KEY}: {timesteps} gave {list(chosen)}; {num_steps} different timesteps from "
            f"0 to {total - 1} are needed, in descending order."
        )
    values = vars(noise) | {"alphas_cumprod": noise.alphas_cumprod.to(device)}
    return DDIM(**values, timesteps=chosen, eta=eta)


def x0_from_epsilon(epsilon: Tensor, latents: Tensor, abar: Tensor) -> Tensor:
    """Returns the predicted x0 (eq. 12)."""
    return (latents - (1 - abar).sqrt() * epsilon) / abar.sqrt()


def dynamic_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """Clamps each sample to its quantile s >= 1 and scales by 1/s (Imagen, arXiv 2205.11487)."""
    s = torch.quantile(x0.flatten(1).abs().float(), ratio, dim=1).clamp(1, maximum)
    s = s.reshape(-1, *(1,) * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


def transition_std(abar: Tensor, abar_next: Tensor, eta: float) -> Tensor:
    """Returns sigma of the transition (eq. 16)."""
    variance = (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    return eta * variance.clamp(min=0).sqrt()


def transition_mean(x0: Tensor, epsilon: Tensor, abar_next: Tensor, sigma: Tensor) -> Tensor:
    """Returns the mean of x_t' given the predicted x0 and noise (eq. 12)."""
    direction = (1 - abar_next - sigma**2).clamp(min=0).sqrt()
    return abar_next.sqrt() * x0 + direction * epsilon


def gaussian_log_density(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Returns log N(value; mean, std^2), averaged over all dimensions but the first, (n,)."""
    density = -((value - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(dim=1)
