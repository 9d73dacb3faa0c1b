"""Named numbers: means and totals over minibatches, rollouts and processes."""

import json
from pathlib import Path

import pytest
import torch
from helpers import make_pairs, official_scheduler, randn, two_point_sampler
from torch.distributions import Normal, kl_divergence

from spo.launch.workers import Workers
from spo.method.ddim import make_sampler
from spo.method.metrics import Metrics, divergence, note_rollout, summary, time_left
from spo.types import Comparison, NoisePredictions

CPU = torch.device("cpu")


def test_means_weigh_every_number_alike_however_minibatches_are_cut():
    metrics = Metrics(CPU)
    for part in torch.arange(10.0).split([1, 6, 3]):
        metrics.mean("error", part)
        metrics.mean("loss", part.mean())  # one number for each minibatch
        metrics.total("pairs", len(part))
    # Minibatches' means are 0, 3.5 and 8.
    assert summary(metrics.sums) == {"error": 4.5, "loss": pytest.approx(11.5 / 3), "pairs": 10}


def test_totals_with_a_slash_are_entries():
    metrics = Metrics(CPU)
    for timestep, number in ((951, 2), (901, torch.tensor(3)), (951, torch.tensor(4))):
        metrics.total(f"pairs_at/{timestep}", number)
    line = summary(metrics.sums)
    assert line == {"pairs_at": {"951": 6, "901": 3}}
    assert all(type(number) is int for number in line["pairs_at"].values())


def test_a_mean_of_nothing_is_none_and_as_an_entry_left_out():
    metrics, nothing = Metrics(CPU), torch.tensor([torch.nan])
    metrics.mean("win_margin", torch.zeros(0))
    for values in (torch.tensor([1.0, torch.nan, 3.0]), nothing, torch.tensor([8.0])):
        metrics.nanmean("kl_at/951", values)
    metrics.nanmean("kl_at/901", nothing)
    assert summary(metrics.sums) == {"win_margin": None, "kl_at": {"951": 4.0}}
    assert summary({}) == {}


def test_sums_keep_their_digits_and_no_gradients():
    metrics, value = Metrics(CPU), torch.tensor(2.0**24, requires_grad=True)
    for _ in range(3):
        metrics.mean("large", torch.stack([value, torch.tensor(1.0)]))
    assert {tensor.dtype for tensor in metrics.sums.values()} == {torch.float64}
    assert not any(tensor.requires_grad for tensor in metrics.sums.values())
    assert summary(metrics.sums)["large"] == (2**24 + 1) / 2


def of_two_processes():
    first, second = Metrics(CPU), Metrics(CPU)
    first.mean("loss", torch.tensor([1.0, 2.0, 6.0]))
    second.mean("loss", torch.tensor([11.0]))
    first.nanmean("kl_at/1", torch.tensor([1.0, torch.nan, 2.0]))
    second.nanmean("kl_at/1", torch.tensor([6.0]))
    second.nanmean("kl_at/51", torch.tensor([4.0]))
    first.total("pairs", 3)
    second.total("pairs", 1)
    second.mean("grad_norm", torch.tensor(0.5))  # the first process made no update
    return first, second


def test_numbers_of_two_processes(monkeypatch):
    first, second = of_two_processes()
    others = {id(first): second, id(second): first}
    for own in (first, second):
        other = others[id(own)]
        workers = object.__new__(Workers)
        numbers = {name: float(value) for name, value in other.sums.items()}
        monkeypatch.setattr(workers, "gather", lambda part, n=numbers: [*part, n], False)
        names = list(dict.fromkeys([*own.sums, *other.sums]))
        sums = workers.sum(own.sums)
        assert list(sums) == names
        kl_at = {"1": 3.0, "51": 4.0}
        assert summary(sums) == {"loss": 5.0, "pairs": 4, "grad_norm": 0.5, "kl_at": kl_at}


def test_the_numbers_of_a_rollout():
    """Two comparisons of 3 candidates of 2 prompts; a sample's standard deviation divides by 2."""
    scores = torch.tensor([[0.0, 3.0], [3.0, 3.0], [6.0, 3.0]])
    comparisons = [
        Comparison(901, scores, gaps=torch.tensor([0.9, 0.0])),
        Comparison(851, scores + 2, gaps=torch.tensor([0.6, 0.1])),
    ]
    metrics = Metrics(CPU)
    note_rollout(metrics, comparisons, torch.tensor([951, 901, 951]), timesteps=(951, 901, 851))
    assert summary(metrics.sums) == {
        "score_mean": 4.0,
        "score_spread": 1.5,
        "win_margin": pytest.approx(0.4),
        "comparisons": 4,
        "images": 12,
        "pairs": 3,
        "pairs_at": {"951": 2, "901": 1, "851": 0},
    }


@pytest.mark.parametrize(("left", "rest"), [(3600, "2 hours"), (90, "3 minutes")])
def test_the_time_that_is_left(left, rest):
    line = time_left(seconds=8.0, prompts=4, prompts_left=left)
    assert line.startswith("rate: 2 s for a prompt") and line.endswith(f"are left take {rest}")


TIMESTEPS = [951, 301, 51, 1]


@pytest.mark.parametrize("latents_each", [1, 2])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clip", [False, True])
def test_the_divergence_of_transitions_is_that_of_normals(latents_each, prediction_type, clip):
    """Means and deviations are those of diffusers' own step."""
    changes = {"prediction_type": prediction_type, "clip_sample": clip}
    scheduler = official_scheduler(20, **changes)
    sampler = make_sampler(dict(scheduler.config), 20, eta=1.0)
    latents, policy, reference = (randn(4, latents_each, 4, 5, 5, seed=i) for i in range(3))
    pairs = make_pairs(latents, latents, latents, TIMESTEPS)
    expected, epsilons = torch.zeros(4, latents_each), torch.zeros(2, *latents.shape)
    for i, t in enumerate(TIMESTEPS):
        std = scheduler._get_variance(t, t - 50).sqrt()
        for j in range(latents_each):
            row, outputs = latents[i : i + 1, j], (policy[i : i + 1, j], reference[i : i + 1, j])
            means = [
                scheduler.step(o, t, row, eta=1.0, variance_noise=torch.zeros_like(o)).prev_sample
                for o in outputs
            ]
            expected[i, j] = kl_divergence(*(Normal(mean, std) for mean in means)).sum()
            for k in (0, 1):
                epsilons[k, i, j] = sampler.predict(outputs[k], row, t).epsilon[0]
    found = divergence(NoisePredictions(*epsilons, None), pairs, sampler)
    torch.testing.assert_close(found, expected.mean(dim=1), rtol=1e-4, atol=0)


def test_a_divergence_by_hand_and_its_gaps():
    """From abar 0.5 to 0.8 sigma^2 is 0.15, and the mean moves by sqrt(0.05) - sqrt(0.8) per eps."""
    latents, two = randn(1, 1, 1, 1, 2, seed=0), torch.tensor([1.0, 3.0]).view(1, 1, 1, 1, 2)
    predictions = NoisePredictions(latents + two.requires_grad_(), latents, None)
    pairs = make_pairs(latents, latents, latents, timesteps=[1])
    found = divergence(predictions, pairs, two_point_sampler(0.5, 0.8))
    # (-0.6708)^2 / 0.15 / 2 = 1.5, times 1^2 + 3^2.
    assert found.tolist() == pytest.approx([15.0]) and not found.requires_grad
    assert (
        divergence(NoisePredictions(latents, latents, None), pairs, two_point_sampler(0.5, 0.8))
        == 0
    )
    for abar, abar_next, eta in ((0.5, 0.5, 1.0), (0.5, 0.8, 0.0), (0.0, 0.8, 1.0)):
        sampler = two_point_sampler(abar, abar_next, eta)
        assert divergence(predictions, pairs, sampler).isnan().all()
    # The last transition of linspace leads from t = 0 to itself; the others have a divergence.
    config = json.loads((Path(__file__).parent / "data" / "scheduler_linspace.json").read_text())
    both = make_pairs(*[latents.expand(2, -1, -1, -1, -1)] * 3, timesteps=[0, 999])
    found = divergence(
        NoisePredictions(both.latents + two, both.latents, None),
        both,
        make_sampler(config, 10, 1.0),
    )
    assert found.isnan().tolist() == [True, False]
