"""The sampler against diffusers' own scheduler, the density against torch's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
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


def paper_sampler(eta=1.0, timesteps="leading"):
    return ddim.make_sampler(config_of("sd15"), 20, eta, timesteps)


def step(sampler, output, latents, timesteps, noise):
    return sampler.step(sampler.predict(output, latents, timesteps), timesteps, noise)


def check_against_diffusers(num_steps, spacing, **changes):
    scheduler = official_scheduler(num_steps, timestep_spacing=spacing, **changes)
    config = config_of("sd15", **changes)
    samplers = [ddim.make_sampler(config, num_steps, eta, spacing) for eta in (0.0, 0.5, 1.0)]
    assert samplers[0].timesteps == tuple(scheduler.timesteps.tolist())
    for i, timestep in enumerate(samplers[0].timesteps):
        # Sizes such that x0 leaves [-1, 1] and its 80 % quantile lies below 1, between and above 2.5.
        latents, output, noise = (randn(3, 4, 5, 5, seed=10 * i + j) for j in range(3))
        output = output * torch.tensor([0.5, 1.5, 3.0]).view(3, 1, 1, 1)
        for sampler in samplers:
            expected = scheduler.step(
                output, timestep, latents, eta=sampler.eta, variance_noise=noise
            )
            found = step(sampler, output, latents, timestep, noise)
            torch.testing.assert_close(found, expected.prev_sample, rtol=1e-5, atol=2e-5)
            x0 = sampler.predict(output, latents, timestep).x0
            torch.testing.assert_close(x0, expected.pred_original_sample, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_steps", [20, 10, 7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_every_step_is_that_of_diffusers(num_steps, prediction_type, bounds):
    changes = BOUNDS[bounds] | {"prediction_type": prediction_type}
    check_against_diffusers(num_steps, "leading", **changes)


@pytest.mark.parametrize(
    "num_steps", [20, 8]
)  # divisors of 1,000: else diffusers' t' is no timestep
def test_every_trailing_step_is_that_of_diffusers(num_steps):
    check_against_diffusers(num_steps, "trailing", **BOUNDS["none"])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])  # PNDM's and Euler's configs
def test_schedule_of_the_paper(family):
    sampler = ddim.make_sampler(config_of(family), 20, eta=1.0)
    assert sampler.timesteps == tuple(range(951, 0, -50))
    assert [sampler.next(t) for t in (951, 51, 1)] == [901, 1, 0]
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    for schedule in (sampler, ddim.noise_schedule(config_of(family))):
        np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4)
        assert schedule.alphas_cumprod.dtype == torch.float32
        assert (schedule.clip_range, schedule.threshold_ratio) == (None, None)


def test_trailing_timesteps_are_those_of_diffusers():
    assert paper_sampler(timesteps="trailing").timesteps == tuple(range(999, 0, -50))
    for num_steps in (1, 3, 7, 12, 30, 64, 300, 999, 1000):
        expected = official_scheduler(num_steps, timestep_spacing="trailing").timesteps.tolist()
        found = ddim.make_sampler(config_of("sd15"), num_steps, 1.0, "trailing").timesteps
        assert list(found) == expected


def uneven(num_steps, alphas_cumprod, steps_offset):
    """Timesteps at equal distances of the noise level, the offset added."""
    levels = (1 - alphas_cumprod).sqrt()
    wanted = torch.linspace(levels[-2].item(), levels[0].item(), num_steps)
    return [int((levels - level).abs().argmin()) + steps_offset for level in wanted]


def test_timesteps_of_a_function_of_ones_own():
    sampler = paper_sampler(timesteps=f"{__name__}:uneven")
    first, second, *_, last = sampler.timesteps
    assert (first, last, len(set(sampler.timesteps))) == (999, 1, 20)
    # The transition leads to the next of the list, however far that is.
    assert sampler.next(first) == second != first - 50
    latents, output, noise = (randn(1, 4, 5, 5, seed=j) for j in range(3))
    abar, abar_next = sampler.alphas_cumprod[[first, second]]
    x0 = (latents - (1 - abar).sqrt() * output) / abar.sqrt()
    sigma = ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
    mean = abar_next.sqrt() * x0 + (1 - abar_next - sigma**2).sqrt() * output
    found = step(sampler, output, latents, first, noise)
    torch.testing.assert_close(found, mean + sigma * noise)


WRONG = {
    "ascending": list(range(1, 1000, 50)),
    "one too few": list(range(951, 50, -50)),
    "one too many": list(range(991, 0, -49)),
    "none": [],
    "twice": [951, *range(951, 50, -50)],
    "below 0": list(range(940, -20, -50)),
    "beyond": list(range(1000, 49, -50)),
}


@pytest.mark.parametrize("name", WRONG)
def test_timesteps_that_are_none_are_one_error(name, monkeypatch):
    monkeypatch.setitem(globals(), "wrong", lambda *_: WRONG[name])
    with pytest.raises(UserError, match=r"sample\.(timesteps|num_steps)") as error:
        paper_sampler(timesteps=f"{__name__}:wrong")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["middle", f"{__name__}:no_such_function", "no.module:x"])
def test_a_schedule_that_is_nowhere(name):
    with pytest.raises(UserError, match="sample.timesteps: "):
        ddim.SamplerSettings(num_steps=20, eta=1.0, timesteps=name)


@pytest.mark.parametrize("timesteps", ["leading", "trailing"])
def test_the_next_timestep_of_numbers_and_tensors(timesteps):
    sampler = paper_sampler(timesteps=timesteps)
    expected = [*sampler.timesteps[1:], 0]
    assert [sampler.next(t) for t in sampler.timesteps] == expected
    rows = torch.tensor(sampler.timesteps)[[19, 0, 7, 7]]
    assert sampler.next(rows).tolist() == [expected[i] for i in (19, 0, 7, 7)]
    with pytest.raises(KeyError):
        sampler.next(500)


def test_rows_with_timesteps_of_their_own():
    sampler = paper_sampler()
    latents, output, noise = (randn(3, 4, 5, 5, seed=j) for j in range(3))
    timesteps = [751, 301, 1]
    together = step(sampler, output, latents, torch.tensor(timesteps), noise)
    for i, timestep in enumerate(timesteps):
        row = slice(i, i + 1)
        alone = step(sampler, output[row], latents[row], timestep, noise[row])
        torch.testing.assert_close(together[row], alone, rtol=1e-6, atol=1e-6)


def test_one_transition_by_hand():
    # abar 0.5 -> 0.8: sigma^2 = (0.2 / 0.5) (1 - 0.5 / 0.8) = 0.15.
    abar, abar_next = torch.tensor(0.5), torch.tensor(0.8)
    sigma = ddim.transition_std(abar, abar_next, eta=1.0)
    assert sigma.item() == pytest.approx(math.sqrt(0.15))
    assert ddim.transition_std(abar, abar_next, eta=0.5).item() == pytest.approx(0.193649167)
    # x0 = (1 - sqrt(0.5) 2) / sqrt(0.5) = sqrt(2) - 2; mean = sqrt(0.8) x0 + sqrt(0.05) 2.
    x0 = ddim.x0_from_epsilon(torch.tensor(2.0), torch.tensor(1.0), abar)
    mean = ddim.transition_mean(x0, torch.tensor(2.0), abar_next, sigma)
    assert mean.item() == pytest.approx(math.sqrt(1.6) - 2 * math.sqrt(0.8) + 2 * math.sqrt(0.05))


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_foreign_scheduler_config_does_not_clamp_latents(scheduler):
    config = dict(scheduler(beta_schedule="scaled_linear", steps_offset=1).config)
    assert "clip_sample" not in config
    latents = torch.full((1, 4, 2, 2), 4.0)
    for schedule in (ddim.make_sampler(config, 20, 1.0), ddim.noise_schedule(config)):
        assert schedule.predict(torch.zeros_like(latents), latents, 1).x0.max() > 4


# 1000 steps would begin at t = 1000, as this config counts from 1.
@pytest.mark.parametrize("num_steps", [0, 1000, 1001])
def test_a_number_of_steps_that_does_not_fit_is_named(num_steps):
    with pytest.raises(UserError, match=f"sample.num_steps, eval.num_steps: {num_steps} "):
        ddim.make_sampler(config_of("sd15"), num_steps, 1.0)


def test_added_noise_is_that_of_diffusers():
    schedule, timesteps = ddim.noise_schedule(config_of("sd15")), torch.tensor([751, 301, 1])
    x0, noise = randn(3, 4, 5, 5, seed=0), randn(3, 4, 5, 5, seed=1)
    expected = official_scheduler(20).add_noise(x0, noise, timesteps)
    torch.testing.assert_close(schedule.add_noise(x0, noise, timesteps), expected)
    level = schedule.noise_level(timesteps, x0)
    torch.testing.assert_close(
        level, (1 - official_scheduler(20).alphas_cumprod[timesteps]).sqrt().view(3, 1, 1, 1)
    )


def test_log_density():
    value, mean = randn(3, 4, 5, 5, seed=0), randn(3, 4, 5, 5, seed=1)
    for std in (torch.tensor(0.3), torch.tensor([0.1, 1.0, 2.0]).view(3, 1, 1, 1)):
        log_prob = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(value)
        found = ddim.gaussian_log_density(value, mean, std)
        torch.testing.assert_close(found, log_prob.flatten(1).mean(dim=1))
    # One standard deviation away under N(0, 1): -1/2 - log(2 pi) / 2, however many pixels.
    one = ddim.gaussian_log_density(torch.ones(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor(1.0))
    assert one.item() == pytest.approx(-1.4189385332)


def test_the_models_own_spacing():
    config = json.loads((Path(__file__).parent / "data" / "scheduler_linspace.json").read_text())
    scheduler = official_scheduler(10, timestep_spacing="linspace")
    sampler = ddim.make_sampler(config, 10, eta=1.0)
    assert sampler.timesteps == tuple(scheduler.timesteps.tolist())
    # Each leads to the next of the list, the last to itself.
    expected = [888, 777, 666, 555, 444, 333, 222, 111, 0, 0]
    assert [sampler.next(t) for t in sampler.timesteps] == expected
    assert sampler.next(torch.tensor(sampler.timesteps)).tolist() == expected
    trailing = ddim.make_sampler(config | {"timestep_spacing": "trailing"}, 20, eta=1.0)
    assert trailing.timesteps == paper_sampler(timesteps="trailing").timesteps
    # What a scheduler's class alone would say is not the model's; a choice of the config goes first.
    euler = EulerDiscreteScheduler.from_config({k: config[k] for k in config if k[:4] == "beta"})
    assert euler.config.timestep_spacing == "linspace"
    assert ddim.make_sampler(dict(euler.config), 20, 1.0).timesteps == tuple(range(950, -1, -50))
    assert ddim.make_sampler(config, 20, 1.0, "leading").timesteps == tuple(range(951, 0, -50))
    assert ddim.make_sampler(config_of("sd15"), 20, 1.0).timesteps == tuple(range(951, 0, -50))


def test_zero_terminal_snr_is_that_of_diffusers():
    changes = BOUNDS["none"] | {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    }
    scheduler = official_scheduler(20, timestep_spacing="trailing", **changes)
    output, latents, noise = (randn(1, 4, 5, 5, seed=j) for j in range(3))
    for eta in (0.0, 0.5):
        sampler = ddim.make_sampler(config_of("sd15", **changes), 20, eta, "trailing")
        expected = scheduler.step(output, 999, latents, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(step(sampler, output, latents, 999, noise), expected)
    assert torch.equal(sampler.alphas_cumprod, scheduler.alphas_cumprod)
    assert sampler.alphas_cumprod[999] == 0
    # At eta 1 diffusers takes the root of a number that is rounded below 0.
    sampler = ddim.make_sampler(config_of("sd15", **changes), 20, 1.0, "trailing")
    assert step(sampler, output, latents, 999, noise).isfinite().all()


@pytest.mark.parametrize(
    "changes", [{"prediction_type": "flow"}, {"beta_schedule": "x"}, {"timestep_spacing": "os:x"}]
)
def test_what_no_ddim_has(changes):
    with pytest.raises(ValueError, match="its scheduler"):
        ddim.make_sampler(config_of("sd15", **changes), 20, 1.0)
