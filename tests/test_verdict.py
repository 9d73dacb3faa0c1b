"""The verdict on a run, on made-up curves; and what it is made of, on made-up images."""

import math

import numpy as np
import pytest
import torch

from spo.guard import pixel_statistics
from spo.guard.pixel_statistics import STATISTICS, diversity
from spo.guard.verdict import CANNOT_TELL, HEALTHY, OVEROPTIMISED, WORSE, Evaluation, decide

PROMPTS = 64


def curves(reward, judge, noise=0.3, seed=0, judges=("judges/one",)):
    """Evaluations of a run with these mean gains per epoch; `noise` is that of a prompt's gain."""
    rng = np.random.default_rng(seed)
    base = rng.normal(20, 1, PROMPTS)  # prompts differ by 1, so gains are in standard deviations

    def scores(gain):
        return (base + gain + (rng.normal(0, noise, PROMPTS) if gain is not None else 0)).tolist()

    pixels = {"pixels/saturation": [0.5] * PROMPTS}
    found = [Evaluation(0, {name: base.tolist() for name in ("reward", *judges)} | pixels)]
    for epoch, (r, j) in enumerate(zip(reward, judge, strict=True), start=1):
        own = {"reward": scores(r)} | {name: scores(j) for name in judges}
        found.append(Evaluation(epoch, own | {"pixels/saturation": [0.5 + 0.1 * r] * PROMPTS}))
    return found


def verdicts(found):
    """The verdict after each epoch."""
    return [decide(found[: i + 1]) for i in range(1, len(found))]


RISE = [0.3, 0.6, 0.8, 0.9, 1.0, 1.1]


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_rises_is_healthy_and_its_last_epoch_is_shipped(seed):
    found = verdicts(curves(RISE, RISE, seed=seed, noise=0.1))
    assert [each.status for each in found] == [HEALTHY] * 6
    assert [each.ship for each in found] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("seed", range(4))
def test_a_plateau_is_never_overoptimised(seed):
    flat = [0.3, 0.6, *[0.7] * 8]
    found = verdicts(curves(flat, flat, seed=seed))
    assert {each.status for each in found} == {HEALTHY}


@pytest.mark.parametrize("seed", range(2))
def test_a_collapse_turns_the_verdict_at_once_and_names_the_epoch_before(seed):
    judge = [0.4, 0.8, 1.0, 0.4, -0.2, -0.8]
    found = verdicts(curves(RISE, judge, seed=seed))
    assert [each.status for each in found] == [HEALTHY] * 3 + [OVEROPTIMISED] * 3
    assert [each.ship for each in found] == [1, 2, 3, 3, 3, 3]
    assert found[-1].is_overoptimised
    assert found[-1].since_ship["judges/one"].mean == pytest.approx(-1.8, abs=0.2)
    assert "over-optimised (since epoch 3: reward +0." in found[-1].describe()
    assert found[-1].describe().endswith("); ship epoch 3")


@pytest.mark.parametrize("seed", range(4))
def test_noise_alone_is_no_health(seed):
    found = verdicts(curves([0.0] * 4, [0.0] * 4, noise=1.0, seed=seed))
    assert HEALTHY not in {each.status for each in found}
    assert OVEROPTIMISED not in {each.status for each in found}


def test_wide_intervals_tell_nothing():
    found = verdicts(curves([0.2], [0.2], noise=3.0, seed=1))
    assert found[0].status == CANNOT_TELL


def test_worse_from_the_beginning():
    (found,) = verdicts(curves([0.5], [-0.5]))
    assert (found.status, found.ship) == (WORSE, 0)
    assert found.is_overoptimised
    assert found.describe().endswith("worse than untrained")


def test_an_epoch_that_was_lucky_does_not_hide_a_fall():
    first, second = verdicts(curves([0.5, 1.0], [0.05, -0.8], noise=0.6, seed=1))
    assert (first.status, second.status) == (CANNOT_TELL, WORSE)
    assert second.ship == first.ship == 1


def test_a_reward_that_falls_is_told_before_the_judges():
    found = verdicts(curves([0.5, 1.0, 0.7], [0.3, 0.5, 0.8]))
    assert [each.status for each in found] == [HEALTHY, HEALTHY, OVEROPTIMISED]
    assert "(the reward has fallen from its best); ship epoch 3" in found[-1].describe()


def test_a_sure_fall_of_next_to_nothing_is_none():
    found = verdicts(curves([0.5, 1.0, 1.0], [0.3, 1.0, 0.97], noise=0.01))
    assert found[-1].since_ship["judges/one"].high < 0
    assert [each.status for each in found] == [HEALTHY] * 3


def test_without_judges_or_reward_nobody_can_tell():
    assert {each.status for each in verdicts(curves(RISE, RISE, judges=()))} == {CANNOT_TELL}
    found = curves(RISE, RISE)
    blind = [
        Evaluation(e.epochs, {k: v for k, v in e.scores.items() if k != "reward"}) for e in found
    ]
    assert decide(blind).status == CANNOT_TELL


def test_judges_count_alike_whatever_their_scales():
    base = {"reward": [0.0, 1.0], "judges/a": [0.0, 2.0], "judges/b": [0.0, 200.0]}
    last = {"reward": [1.0, 2.0], "judges/a": [1.0, 3.0], "judges/b": [-200.0, 0.0]}
    found = decide([Evaluation(0, base), Evaluation(1, last)])
    # a rises by one of its standard deviations, which is 1, and b falls by two of its own, 100.
    assert found.differences["judges/b"].mean == -200
    assert found.status == WORSE


def test_a_judge_that_failed_on_the_way_is_left_out():
    found = curves(RISE, RISE, judges=("judges/a", "judges/b"))
    del found[3].scores["judges/b"]
    assert "judges/b" not in decide(found).differences
    assert decide(found).status == HEALTHY


def test_the_line_of_numbers():
    numbers = decide(curves([1.0], [0.5])).numbers()
    assert numbers["reward"]["mean"] == pytest.approx(1.0, abs=0.1)
    assert numbers["judges"].keys() == {"one"}
    assert numbers["pixels"]["saturation"] == {"untrained": 0.5, "now": 0.6}
    assert numbers["verdict"] == HEALTHY
    assert numbers["ship"] == 1
    assert "saturation +20 %" in numbers["text"]


def image(*rows):
    """(1, 3, H, W) with these rows of (R, G, B)."""
    return torch.tensor(rows).permute(2, 0, 1)[None].float()


RED, GREY, PINK, BLACK, WHITE = (1, 0, 0), (0.5,) * 3, (1, 0.5, 0.5), (0,) * 3, (1,) * 3


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("saturation", [[RED, GREY], [PINK, BLACK]], (1 + 0 + 0.5 + 0) / 4),
        ("contrast", [[BLACK, WHITE], [WHITE, BLACK]], 0.5),
        ("contrast", [[RED, BLACK]], 0.2126 / 2),
        ("clipped", [[RED, GREY], [PINK, (0.001, 0.5, 0.999)]], (3 + 0 + 1 + 2) / 12),
        # Half a cycle per pixel, along one axis or both, is all fine; what is flat has none.
        ("high_frequencies", [[BLACK, WHITE], [WHITE, BLACK]], 0.5),
        ("high_frequencies", [[GREY, GREY], [GREY, GREY]], 0.0),
    ],
)
def test_statistics_of_pixels(name, rows, expected):
    assert STATISTICS[name](image(*rows)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("cycles", "expected"), [(4, 0.0), (12, math.sqrt(0.5) / 4)])
def test_only_high_frequencies_count(cycles, expected):
    wave = 0.5 + torch.sin(2 * math.pi * cycles / 32 * torch.arange(32)) / 4
    images = wave.expand(2, 3, 32, 32)
    assert pixel_statistics.high_frequencies(images).tolist() == pytest.approx(
        [expected] * 2, abs=1e-6
    )


def test_diversity_is_the_mean_distance_of_a_prompts_images():
    east, north, north_east = (1.0, 0.0), (0.0, 1.0), (math.sqrt(0.5), math.sqrt(0.5))
    features = torch.tensor(
        [[east, east], [east, north], [east, north_east]]
    )  # (3 seeds, 2 prompts, 2)
    apart = 1 - math.sqrt(0.5)
    assert diversity(features).tolist() == pytest.approx([0, (1 + apart + apart) / 3], abs=1e-6)
