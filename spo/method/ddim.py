"""The DDIM transition and its density: pure functions of tensors.

Equations are those of Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502.
`abar` is `alphas_cumprod[t]`; scalars broadcast against latents, so does (n, 1, 1, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from spo.errors import UserError


@dataclass(frozen=True)
class DDIMSchedule:
    """The timesteps of a run and the noise schedule of its base model."""

    timesteps: tuple[int, ...]  # num_steps timesteps, descending
    stride: int  # t - t', in training timesteps
    alphas_cumprod: Tensor  # (1000,) fp32, on the device of the latents
    prediction_type: str  # "epsilon", "v_prediction" or "sample"
    clip_range: float | None  # clamp x0 to +- this
    threshold_ratio: float | None  # dynamic thresholding of x0: quantile, and ...
    threshold_max: float  # ... the largest value it may scale down from

    def previous(self, timestep: int) -> int:
        """t', the timestep that the transition from `timestep` leads to."""
        return max(timestep - self.stride, 0)

    def abar(self, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """`alphas_cumprod` at one timestep: (); at (n,): (n, 1, ..., 1) to go with `like` (n, ...)."""
        values = self.alphas_cumprod[timesteps]
        return values.reshape(values.shape + (1,) * (like.ndim - 1)) if values.ndim else values

    def abar_previous(self, timesteps: Tensor | int, like: Tensor) -> Tensor:
        """`alphas_cumprod` at t', shaped as `abar`."""
        if isinstance(timesteps, int):
            return self.abar(self.previous(timesteps), like)
        return self.abar((timesteps - self.stride).clamp(min=0), like)


def make_schedule(
    scheduler_config: dict, num_steps: int, device: torch.device | str = "cpu"
) -> DDIMSchedule:
    """The DDIM schedule of `num_steps` steps made from a base model's own scheduler config.

    Raises UserError when `num_steps` does not fit the model's training timesteps.
    """
    # A foreign config (PNDM, Euler, DPM-Solver) may lack DDIM's own `clip_sample`, whose default in
    # diffusers is to clamp x0 to [-1, 1]: right for pixels, ruin for latents.
    scheduler = DDIMScheduler.from_config({"clip_sample": False, **scheduler_config})
    total = scheduler.config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise UserError(
            f"sample.num_steps, eval.num_steps: {num_steps} is not between 1 and {total}."
        )
    scheduler.set_timesteps(num_steps)
    if scheduler.timesteps[0] >= total:
        raise UserError(
            f"sample.num_steps, eval.num_steps: {num_steps} steps begin at t = "
            f"{scheduler.timesteps[0]}, beyond the model's {total} timesteps; use fewer."
        )
    config = scheduler.config
    return DDIMSchedule(
        timesteps=tuple(scheduler.timesteps.tolist()),
        stride=total // num_steps,
        alphas_cumprod=scheduler.alphas_cumprod.to(device, torch.float32),
        prediction_type=config.prediction_type,
        # Thresholding takes precedence over clipping, as in diffusers.
        clip_range=config.clip_sample_range if config.clip_sample else None,
        threshold_ratio=config.dynamic_thresholding_ratio if config.thresholding else None,
        threshold_max=config.sample_max_value,
    )


def add_noise(x0: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """x_t of `x0` and standard normal `noise` (eq. 4)."""
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def to_epsilon(schedule: DDIMSchedule, output: Tensor, latents: Tensor, abar: Tensor) -> Tensor:
    """Noise prediction from a model output of any prediction type."""
    if schedule.prediction_type == "epsilon":
        return output
    if schedule.prediction_type == "v_prediction":
        return abar.sqrt() * output + (1 - abar).sqrt() * latents
    return (latents - abar.sqrt() * output) / (1 - abar).sqrt()


def to_x0(schedule: DDIMSchedule, output: Tensor, latents: Tensor, abar: Tensor) -> Tensor:
    """Predicted x0 from a model output of any prediction type, clipped as configured."""
    if schedule.prediction_type == "epsilon":
        return clip_x0(schedule, x0_from_epsilon(output, latents, abar))
    if schedule.prediction_type == "v_prediction":
        return clip_x0(schedule, abar.sqrt() * latents - (1 - abar).sqrt() * output)
    return clip_x0(schedule, output)


def x0_from_epsilon(epsilon: Tensor, latents: Tensor, abar: Tensor) -> Tensor:
    """Predicted x0 (eq. 12)."""
    return (latents - (1 - abar).sqrt() * epsilon) / abar.sqrt()


def clip_x0(schedule: DDIMSchedule, x0: Tensor) -> Tensor:
    """x0 clipped or thresholded as the base model's scheduler config says."""
    if schedule.threshold_ratio is not None:
        return dynamic_threshold(x0, schedule.threshold_ratio, schedule.threshold_max)
    if schedule.clip_range is not None:
        return x0.clamp(-schedule.clip_range, schedule.clip_range)
    return x0


def dynamic_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """Clamp each sample to its `ratio` quantile s >= 1 and scale by 1/s (Imagen, arXiv 2205.11487)."""
    s = torch.quantile(x0.flatten(1).abs().float(), ratio, dim=1).clamp(1, maximum)
    s = s.reshape(-1, *(1,) * (x0.ndim - 1))
    return x0.clamp(-s, s) / s


def transition_std(abar: Tensor, abar_previous: Tensor, eta: float) -> Tensor:
    """sigma of the transition (eq. 16)."""
    variance = (1 - abar_previous) / (1 - abar) * (1 - abar / abar_previous)
    return eta * variance.clamp(min=0).sqrt()


def transition_mean(x0: Tensor, epsilon: Tensor, abar_previous: Tensor, sigma: Tensor) -> Tensor:
    """Mean of x_t' given the predicted x0 and noise (eq. 12)."""
    direction = (1 - abar_previous - sigma**2).clamp(min=0).sqrt()
    return abar_previous.sqrt() * x0 + direction * epsilon


def gaussian_log_density(value: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(value; mean, std^2), averaged over every dimension but the first: (n, ...) -> (n,)."""
    density = -((value - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(dim=1)
