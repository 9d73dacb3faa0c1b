"""The DDIM transition against diffusers' own scheduler, the density against torch's."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from helpers import MODELS, official_scheduler, randn

from spo.errors import UserError
from spo.method import ddim

BOUNDS = {
    "none": {"clip_sample": False},
    "clip": {"clip_sample": True, "clip_sample_range": 1.0},
    "threshold": {
        "clip_sample": True,  # which thresholding takes precedence over
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.8,
        "sample_max_value": 2.5,
    },
}


def config_of(family, **changes):
    path = MODELS / f"tiny-{family}" / "scheduler" / "scheduler_config.json"
    return json.loads(path.read_text()) | changes


def step(schedule, output, latents, timestep, eta, noise):
    abar = schedule.abar(timestep, latents)
    abar_previous = schedule.abar_previous(timestep, latents)
    sigma = ddim.transition_std(abar, abar_previous, eta)
    x0 = ddim.to_x0(schedule, output, latents, abar)
    epsilon = ddim.to_epsilon(schedule, output, latents, abar)
    return ddim.transition_mean(x0, epsilon, abar_previous, sigma) + sigma * noise


@pytest.mark.parametrize("num_steps", [20, 10, 7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_every_step_is_that_of_diffusers(num_steps, prediction_type, bounds):
    changes = BOUNDS[bounds] | {"prediction_type": prediction_type}
    scheduler = official_scheduler(num_steps, **changes)
    schedule = ddim.make_schedule(config_of("sd15", **changes), num_steps)
    assert schedule.timesteps == tuple(scheduler.timesteps.tolist())
    for i, timestep in enumerate(schedule.timesteps):
        # Sizes such that x0 leaves [-1, 1] and its 80 % quantile lies below 1, between and above 2.5.
        latents, output, noise = (randn(3, 4, 5, 5, seed=10 * i + j) for j in range(3))
        output = output * torch.tensor([0.5, 1.5, 3.0]).view(3, 1, 1, 1)
        for eta in (0.0, 0.5, 1.0):
            expected = scheduler.step(output, timestep, latents, eta=eta, variance_noise=noise)
            found = step(schedule, output, latents, timestep, eta, noise)
            torch.testing.assert_close(found, expected.prev_sample, rtol=1e-5, atol=2e-5)
            abar = schedule.abar(timestep, latents)
            x0 = ddim.to_x0(schedule, output, latents, abar)
            torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])  # PNDM's and Euler's configs
def test_schedule_of_the_paper(family):
    schedule = ddim.make_schedule(config_of(family), 20)
    assert schedule.timesteps == tuple(range(951, 0, -50))
    assert [schedule.previous(t) for t in (951, 51, 1)] == [901, 1, 0]
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)
    assert schedule.alphas_cumprod.dtype == torch.float32
    assert (schedule.clip_range, schedule.threshold_ratio) == (None, None)


def test_rows_with_timesteps_of_their_own():
    schedule = ddim.make_schedule(config_of("sd15"), 20)
    latents, output, noise = (randn(3, 4, 5, 5, seed=j) for j in range(3))
    timesteps = [751, 301, 1]
    together = step(schedule, output, latents, torch.tensor(timesteps), 1.0, noise)
    for i, timestep in enumerate(timesteps):
        row = slice(i, i + 1)
        alone = step(schedule, output[row], latents[row], timestep, 1.0, noise[row])
        torch.testing.assert_close(together[row], alone, rtol=1e-6, atol=1e-6)


def test_one_transition_by_hand():
    # abar 0.5 -> 0.8: sigma^2 = (0.2 / 0.5) (1 - 0.5 / 0.8) = 0.15.
    abar, abar_previous = torch.tensor(0.5), torch.tensor(0.8)
    sigma = ddim.transition_std(abar, abar_previous, eta=1.0)
    assert sigma.item() == pytest.approx(math.sqrt(0.15))
    assert ddim.transition_std(abar, abar_previous, eta=0.5).item() == pytest.approx(0.193649167)
    # x0 = (1 - sqrt(0.5) 2) / sqrt(0.5) = sqrt(2) - 2; mean = sqrt(0.8) x0 + sqrt(0.05) 2.
    x0 = ddim.x0_from_epsilon(torch.tensor(2.0), torch.tensor(1.0), abar)
    mean = ddim.transition_mean(x0, torch.tensor(2.0), abar_previous, sigma)
    assert mean.item() == pytest.approx(math.sqrt(1.6) - 2 * math.sqrt(0.8) + 2 * math.sqrt(0.05))


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_foreign_scheduler_config_does_not_clamp_latents(scheduler):
    config = dict(scheduler(beta_schedule="scaled_linear", steps_offset=1).config)
    assert "clip_sample" not in config
    schedule = ddim.make_schedule(config, 20)
    latents = torch.full((1, 4, 2, 2), 4.0)
    x0 = ddim.to_x0(schedule, torch.zeros_like(latents), latents, torch.tensor(0.99))
    assert x0.max() > 4


# 1000 steps would begin at t = 1000, as this config counts from 1.
@pytest.mark.parametrize("num_steps", [0, 1000, 1001])
def test_a_number_of_steps_that_does_not_fit_is_named(num_steps):
    with pytest.raises(UserError, match=f"sample.num_steps, eval.num_steps: {num_steps} "):
        ddim.make_schedule(config_of("sd15"), num_steps)


def test_log_density():
    value, mean = randn(3, 4, 5, 5, seed=0), randn(3, 4, 5, 5, seed=1)
    for std in (torch.tensor(0.3), torch.tensor([0.1, 1.0, 2.0]).view(3, 1, 1, 1)):
        log_prob = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(value)
        found = ddim.gaussian_log_density(value, mean, std)
        torch.testing.assert_close(found, log_prob.flatten(1).mean(dim=1))
    # One standard deviation away under N(0, 1): -1/2 - log(2 pi) / 2, however many pixels.
    one = ddim.gaussian_log_density(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor(1.0))
    assert one.item() == pytest.approx(-1.4189385332)
