"""The losses against cases worked by hand, torch's distributions and diffusers' scheduler."""

import json
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from helpers import MODELS, make_pairs, official_scheduler, randn, two_point_sampler

from spo.errors import UserError
from spo.method.ddim import make_sampler
from spo.method.losses import LOSSES, SPO, GradSPO, make_loss
from spo.types import LossOutput, NoisePredictions

GRADSPO = GradSPO(beta=10.0, clip_eps=0.1, grad_scale=0.5)
UNCLIPPED = replace(GRADSPO, clip_eps=None)
TRAIN = {"beta": 10.0, "clip_eps": 0.1, "grad_scale": 0.5}  # of config.train


def latent(*values):  # a latent with one channel and one row
    return torch.tensor(values).view(1, 1, 1, 1, len(values))


def hand_case():
    """abar = 0.75, so lam = 0.5 sqrt(0.25) = 0.25; g = ([2, 0] - [0, -2]) / 2 = [1, 1].

    Targets: win [-0.25, -0.25], lose [0.25, 0.25].
        l_win(policy)  = -(0.05^2 + 0.15^2) / 2 = -0.0125
        l_win(ref)     = -(0.25^2 + 0.35^2) / 2 = -0.0925
        l_lose(policy) = -(0.45^2 + 0.35^2) / 2 = -0.1625
        l_lose(ref)    = -(0.25^2 + 0.15^2) / 2 = -0.0425
    Win rises by 0.08, lose falls by 0.12.
    """
    noises = torch.cat([latent(2.0, 0.0), latent(0.0, -2.0)], dim=1)
    policy = latent(-0.2, -0.1).requires_grad_()
    predictions = NoisePredictions(policy, reference=latent(0.0, 0.1), ema=latent(0.0, 0.0))
    pairs = make_pairs(latent(0.0, 0.0), noises, noises, timesteps=[1])
    return predictions, pairs, two_point_sampler(abar=0.75, abar_next=0.9)


def test_gradspo_by_hand():
    output = UNCLIPPED(*hand_case())
    assert output.terms["win_policy"].item() == pytest.approx(-0.0125)
    assert output.terms["win_reference"].item() == pytest.approx(-0.0925)
    assert output.terms["lose_policy"].item() == pytest.approx(-0.1625)
    assert output.terms["lose_reference"].item() == pytest.approx(-0.0425)
    assert output.loss.item() == pytest.approx(0.12692801)  # log(1 + exp(-10 (0.08 + 0.12)))
    assert (output.terms["win_ratio"].item(), output.terms["lose_ratio"].item()) == pytest.approx(
        (1.0832871, 0.8869204)  # exp 0.08, exp -0.12
    )
    assert output.terms["clipped"].item() == 0


def test_gradspo_by_hand_clipped_on_one_side():
    predictions, pairs, sampler = hand_case()
    output = GRADSPO(predictions, pairs, sampler)
    # 0.08 < log 1.1 = 0.0953 stays, -0.12 < log 0.9 = -0.1053605 does not: margin 0.1853605.
    assert output.loss.item() == pytest.approx(math.log(1 + math.exp(-1.853605)), rel=1e-5)
    assert (output.terms["win_ratio"].item(), output.terms["lose_ratio"].item()) == pytest.approx(
        (1.0832871, 0.9)
    )
    assert output.terms["clipped"].item() == 0.5
    # Through the win alone: -10 sigmoid(-1.853605) d l_win, with d l_win = -[0.05, 0.15].
    output.loss.backward()
    slope = 10 / (1 + math.exp(1.853605))
    assert predictions.policy.grad.flatten().tolist() == pytest.approx([0.05 * slope, 0.15 * slope])


def test_no_gradient_where_both_ratios_are_clipped():
    predictions, pairs, sampler = hand_case()
    output = replace(GRADSPO, clip_eps=0.05)(predictions, pairs, sampler)
    assert output.loss.item() == pytest.approx(
        math.log(1 + math.exp(-10 * (math.log(1.05) - math.log(0.95)))), rel=1e-5
    )
    assert output.terms["clipped"].item() == 1
    output.loss.backward()
    assert predictions.policy.grad.abs().max() == 0


def random_case(latents_each=1, bounds=None, prediction_noise=1.0, eta=1.0):
    """Three pairs at timesteps of their own, at Stable Diffusion's noise schedule."""
    path = MODELS / "tiny-sd15" / "scheduler" / "scheduler_config.json"
    sampler = make_sampler(json.loads(path.read_text()) | (bounds or {}), 20, eta)
    shape = (4, 5, 5)
    reference = randn(3, latents_each, *shape, seed=0)
    policy = reference + prediction_noise * randn(3, latents_each, *shape, seed=1)
    ema = reference + randn(3, latents_each, *shape, seed=2)
    pairs = make_pairs(
        latents=randn(3, latents_each, *shape, seed=3),
        noises=randn(3, 2, *shape, seed=4),
        next_latents=randn(3, 2, *shape, seed=5),
        timesteps=[751, 301, 1],
    )
    return NoisePredictions(policy.requires_grad_(), reference, ema), pairs, sampler


def test_gradspo_closed_form_without_clips():
    predictions, pairs, sampler = random_case(prediction_noise=0.3)
    output = UNCLIPPED(predictions, pairs, sampler)
    lam = 0.5 * (1 - sampler.alphas_cumprod[[751, 301, 1]]).sqrt()
    g = (pairs.noises[:, 0] - pairs.noises[:, 1]) / 2
    moved = (predictions.policy - predictions.reference)[:, 0]
    difference = -4 * lam * (g * moved).mean(dim=(1, 2, 3))
    expected = torch.log1p(torch.exp(-10 * difference)).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-6)
    # The EMA matters through the clips alone.
    elsewhere = replace(predictions, ema=torch.zeros_like(predictions.ema))
    other = UNCLIPPED(elsewhere, pairs, sampler).loss
    torch.testing.assert_close(other, output.loss, rtol=1e-4, atol=1e-6)
    clipped = [GRADSPO(p, pairs, sampler).loss for p in (predictions, elsewhere)]
    assert (clipped[0] - clipped[1]).abs() > 1e-3


@pytest.mark.parametrize("bounds", [{}, {"clip_sample": True, "clip_sample_range": 1.0}])
@pytest.mark.parametrize("latents_each", [1, 2])
@pytest.mark.parametrize("clip_eps", [0.1, None])
@pytest.mark.parametrize("eta", [1.0, 0.6])
def test_spo_against_diffusers_and_distributions(bounds, latents_each, clip_eps, eta):
    predictions, pairs, sampler = random_case(latents_each, bounds, prediction_noise=0.02, eta=eta)
    # Differences of large log-densities: in double, so that the comparison can be tight.
    predictions = NoisePredictions(**{k: v.detach().double() for k, v in vars(predictions).items()})
    pairs = replace(pairs, latents=pairs.latents.double(), next_latents=pairs.next_latents.double())
    scheduler = official_scheduler(20, **({"clip_sample": False} | bounds))

    def log_density(epsilon, row, candidate):
        own = candidate if latents_each == 2 else 0
        t = pairs.timesteps[row].item()
        given = (epsilon[row, own], t, pairs.latents[row, own])
        zero, one = torch.zeros(4, 5, 5).double(), torch.ones(4, 5, 5).double()
        mean = scheduler.step(*given, eta=eta, variance_noise=zero).prev_sample
        std = scheduler.step(*given, eta=eta, variance_noise=one).prev_sample - mean
        return torch.distributions.Normal(mean, std).log_prob(pairs.next_latents[row, candidate])

    losses, ratios = [], []
    for row in range(3):
        for candidate in range(2):
            policy = log_density(predictions.policy, row, candidate).mean()
            reference = log_density(predictions.reference, row, candidate).mean()
            ratio = (policy - reference).exp()
            ratios.append(ratio if clip_eps is None else ratio.clamp(1 - clip_eps, 1 + clip_eps))
        margin = 10 * (ratios[-2].log() - ratios[-1].log())
        losses.append(torch.log1p(torch.exp(-margin)))
    output = SPO(beta=10.0, clip_eps=clip_eps)(predictions, pairs, sampler)
    found = torch.stack([output.terms["win_ratio"], output.terms["lose_ratio"]], dim=1).flatten()
    torch.testing.assert_close(found, torch.stack(ratios), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_spo_by_hand():
    """abar 0.5 -> 0.8: sigma^2 = 0.15; at x_t = 0 the mean is (sqrt(0.05) - sqrt(0.8)) eps = -s eps.

    With s^2 = 0.45, eps_ref = [0, 0], eps_policy = [-1, 0] and x_t' = [s, 0] (win), [-s, 0] (lose),
    log-densities grow by the fall of the squared distance / (2 * 0.15), averaged over 2 pixels:
        win (0.45 - 0) / 0.3 / 2 = 0.75,  lose (0.45 - 1.8) / 0.3 / 2 = -2.25.
    """
    s = math.sqrt(0.45)
    next_latents = torch.cat([latent(s, 0.0), latent(-s, 0.0)], dim=1)
    pairs = make_pairs(latent(0.0, 0.0), next_latents, next_latents, timesteps=[1])
    predictions = NoisePredictions(latent(-1.0, 0.0), reference=latent(0.0, 0.0), ema=None)
    sampler = two_point_sampler(abar=0.5, abar_next=0.8)
    output = SPO(beta=0.5, clip_eps=None)(predictions, pairs, sampler)
    assert (output.terms["win_policy"] - output.terms["win_reference"]).item() == pytest.approx(
        0.75, rel=1e-5
    )
    assert (output.terms["lose_policy"] - output.terms["lose_reference"]).item() == pytest.approx(
        -2.25, rel=1e-5
    )
    assert output.loss.item() == pytest.approx(0.20141328, rel=1e-5)  # log(1 + exp(-1.5))
    clipped = SPO(beta=0.5, clip_eps=0.1)(predictions, pairs, sampler)
    assert clipped.loss.item() == pytest.approx(
        math.log(1 + math.exp(-0.5 * (math.log(1.1) - math.log(0.9)))), rel=1e-5
    )


@pytest.mark.parametrize("algorithm", LOSSES)
def test_minimising_raises_the_win_margin(algorithm):
    loss = make_loss(algorithm, TRAIN | {"clip_eps": None}, {})
    predictions, pairs, sampler = random_case(prediction_noise=0.001)

    def margin(output):
        terms = output.terms
        rise = terms["win_policy"] - terms["win_reference"]
        return rise - (terms["lose_policy"] - terms["lose_reference"])

    before = loss(predictions, pairs, sampler)
    before.loss.backward()
    moved = predictions.policy.detach() - 1e-2 * predictions.policy.grad
    after = loss(replace(predictions, policy=moved), pairs, sampler)
    assert (margin(after) > margin(before)).all()
    assert after.loss < before.loss.detach()


@pytest.mark.parametrize("algorithm", LOSSES)
@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_huge_differences_stay_finite(algorithm, scale):
    predictions, pairs, sampler = random_case()
    policy = (scale * (pairs.noises[:, :1] - pairs.noises[:, 1:])).requires_grad_()
    predictions = replace(predictions, policy=policy)
    for clip_eps in (0.1, None):
        loss = make_loss(algorithm, TRAIN | {"clip_eps": clip_eps}, {})
        output = loss(predictions, pairs, sampler)
        output.loss.backward()
        assert output.loss.isfinite()
        assert policy.grad.isfinite().all()
        assert output.terms["win_policy"].abs().max() > 1e6  # exp of this overflows
        assert all(values.isfinite().all() for values in output.terms.values())
    # Unclipped, the loss of a pair that is wrong by far is beta times the margin.
    terms = output.terms
    rise = terms["win_policy"] - terms["win_reference"]
    rise = rise - (terms["lose_policy"] - terms["lose_reference"])
    expected = (-10 * rise.double()).clamp(min=0).mean().float()
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-2, atol=1e-6)


def test_only_the_loss_carries_gradients():
    output = GRADSPO(*hand_case())
    assert output.loss.requires_grad
    assert not any(values.requires_grad for values in output.terms.values())
    assert {values.shape for values in output.terms.values()} == {(1,)}


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [("gradspo", GRADSPO), ("spo", SPO(beta=10.0, clip_eps=0.1))],
)
def test_a_loss_takes_its_parameters_from_the_config(algorithm, expected):
    unused = {"learning_rate": 1e-4, "ema_decay": 0.9}
    assert make_loss(algorithm, TRAIN | unused, {}) == expected


@dataclass(frozen=True)
class Hinge:
    """A loss with parameters of its own: `margin`, and `power`, which has a default."""

    beta: float
    margin: float
    power: int = 1
    uses_ema: ClassVar[bool] = False
    shares_latents: ClassVar[bool] = False

    def __call__(self, predictions, pairs, sampler):
        own = (predictions.policy - pairs.noises[:, :1]).square().mean(dim=(1, 2, 3, 4))
        loss = (self.margin - self.beta * own).clamp(min=0) ** self.power
        return LossOutput(loss.mean(), {"own_error": own.detach()})


HINGE = f"{__name__}:Hinge"


def test_a_loss_of_ones_own_has_parameters_of_its_own():
    assert make_loss(HINGE, TRAIN, {"margin": 0.5}) == Hinge(10.0, 0.5)
    assert make_loss(HINGE, TRAIN, {"margin": 2, "power": 3}) == Hinge(10.0, 2, 3)


@pytest.mark.parametrize(
    ("algorithm", "own", "message"),
    [
        (HINGE, {}, "the parameters of .*:Hinge are beta, margin, power; missing .*'margin'"),
        (HINGE, {"margin": 1.0, "width": 2.0}, "unexpected keyword argument 'width'"),
        (HINGE, {"margin": 1.0, "beta": 2.0}, "multiple values for keyword argument 'beta'"),
        ("gradspo", {"margin": 1.0}, "the parameters of gradspo are beta, clip_eps, grad_scale; "),
    ],
)
def test_parameters_that_do_not_fit(algorithm, own, message):
    with pytest.raises(UserError, match=f"^train.loss_kwargs: .*{message}") as error:
        make_loss(algorithm, TRAIN, own)
    assert "\n" not in str(error.value)


def test_a_missing_parameter_is_named_even_if_it_is_one_of_the_config():
    with pytest.raises(UserError, match="^train.loss_kwargs: .*missing .*'grad_scale'"):
        make_loss("gradspo", {"beta": 10.0, "clip_eps": 0.1}, {})


class Undecided:
    """Says nothing about the EMA."""

    shares_latents = True


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("spo.method.losses:LOSSES", "LOSSES is not a class of losses"),
        ("builtins:dict", "builtins:dict is not a class of losses"),
        (f"{__name__}:Undecided", ":Undecided must say uses_ema = True or False"),
    ],
)
def test_a_thing_that_is_no_loss(algorithm, message):
    with pytest.raises(UserError, match=f"^algorithm: .*{message}"):
        make_loss(algorithm, TRAIN, {})


@pytest.mark.parametrize(
    ("key", "value"), [("beta", 0.0), ("beta", math.inf), ("clip_eps", 1.0), ("grad_scale", -1.0)]
)
def test_a_loss_checks_its_parameters(key, value):
    with pytest.raises(UserError, match=rf"^train\.{key}: {value} must be above 0"):
        replace(GRADSPO, **{key: value})
