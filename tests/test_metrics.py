"""Named numbers: means and totals over minibatches, rollouts and processes."""

import pytest
import torch

from spo.launch.workers import Workers
from spo.method.metrics import Metrics, note_rollout, summary, time_left
from spo.types import Comparison

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


def test_a_mean_of_nothing_is_none():
    metrics = Metrics(CPU)
    metrics.mean("win_margin", torch.zeros(0))
    assert summary(metrics.sums) == {"win_margin": None}
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
        assert summary(sums) == {"loss": 5.0, "pairs": 4, "grad_norm": 0.5}


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
