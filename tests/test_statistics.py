"""Paired statistics on data whose answer is known."""

import numpy as np
import pytest

from spo.evaluation.statistics import bootstrap_mean, paired_difference, percent, win_rate


def test_the_interval_of_a_normal_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)


@pytest.mark.slow
def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(2)
    estimates = [bootstrap_mean(rng.exponential(size=60)) for _ in range(200)]
    covered = np.mean([e.low <= 1.0 <= e.high for e in estimates])
    assert 0.88 < covered < 0.98  # 95 % for many values, a little less for 60 skewed ones


def test_pairs_are_compared_one_by_one():
    base = np.random.default_rng(3).normal(0, 100, size=50)
    estimate = paired_difference(base, base + 1)
    assert estimate.low == pytest.approx(1) and estimate.high == pytest.approx(1)


def test_wins_losses_and_ties():
    assert win_rate([1, 1, 1, 1], [2, 2, 0, 1]).mean == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_identical_models_tie():
    scores = np.random.default_rng(4).normal(size=30)
    difference, wins = paired_difference(scores, scores), win_rate(scores, scores)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert (wins.mean, wins.low, wins.high) == (0.5, 0.5, 0.5)


def test_the_interval_of_a_win_rate_is_binomial():
    estimate = win_rate(np.zeros(200), np.repeat([1.0, -1.0], [150, 50]))
    half = 1.96 * np.sqrt(0.75 * 0.25 / 200)
    assert estimate.mean == 0.75
    assert estimate.low == pytest.approx(0.75 - half, abs=0.01)
    assert estimate.high == pytest.approx(0.75 + half, abs=0.01)


def test_an_interval_repeats():
    values = np.random.default_rng(5).normal(size=20)
    assert bootstrap_mean(values) == bootstrap_mean(values)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_what_has_no_mean_is_refused(values):
    with pytest.raises(ValueError, match="finite numbers"):
        bootstrap_mean(values)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        win_rate([1, 2], [1])


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0"),
        (1.0, "100"),
        (0.86, "86"),
        (0.995, "99.5"),
        (0.9996, "99.96"),
        (0.99999, "99.999"),
        (0.004, "0.4"),
        (0.0049999, "0.5"),
        (0.00001, "0.001"),
        (0.994, "99"),
        (0.006, "1"),
    ],
)
def test_no_share_is_rounded_to_none_or_all(share, text):
    assert percent(share) == text


def test_a_tenth_of_a_percent_is_kept_where_it_is_asked_for():
    assert [percent(share, digits=1) for share in (0.5, 0.9996, 1.0)] == ["50.0", "99.96", "100.0"]


def test_a_rate_with_one_lost_pair_of_200_is_not_all():
    rate = win_rate([0.0] * 200, [1.0] * 199 + [-1.0])
    assert rate.percent().startswith("99.5 % [") and rate.percent().endswith(", 100]")
    assert win_rate([0.0] * 9, [1.0] * 9).percent() == "100 % [100, 100]"
