"""The figures of an evaluation, one panel each: means, win rates, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spo.evaluation.figures import INK, colour, panel, shortened, style
from spo.evaluation.results import SummaryRow
from spo.evaluation.statistics import Estimate

_BINS = 25  # odd: the middle one is centred at no difference


def plot_means(rows: Sequence[SummaryRow]) -> Figure:
    """Plots the mean of each model by one scorer, with its interval: points, as no axis starts at 0."""
    with style():
        figure, axes = panel(_height(len(rows)))
        for place, row in enumerate(rows):
            whiskers = _whiskers(row.mean)
            axes.errorbar(row.mean.mean, place, xerr=whiskers, fmt="o", color=colour(place))
        axes.set_title("Mean")
        _name_rows(axes, [row.model for row in rows])
    return figure


def plot_win_rates(rows: Sequence[SummaryRow]) -> Figure:
    """Plots the win rate of every model but the first by one scorer, with its interval."""
    with style():
        figure, axes = panel(_height(len(rows)))
        for place, row in enumerate(rows[1:]):
            share, whiskers = 100 * row.win_rate.mean, 100 * _whiskers(row.win_rate)
            axes.barh(place, share, 0.55, color=colour(place + 1), alpha=0.75)
            axes.errorbar(share, place, xerr=whiskers, color=INK, capsize=2)
        axes.axvline(50, color=INK, linewidth=1, linestyle="--")
        axes.set_xlim(0, 100)
        axes.set_title("Win rate, %")
        _name_rows(axes, [row.model for row in rows[1:]])
    return figure


def plot_differences(differences: Sequence[np.ndarray]) -> Figure:
    """Plots the distribution of the paired differences (n,) of each model to the first."""
    with style():
        figure, axes = panel(_height(len(differences) + 1))
        reach = max(np.abs(each).max() for each in differences) or 1.0
        edges = np.linspace(-reach, reach, _BINS + 1)
        for place, each in enumerate(differences, start=1):
            counts, _ = np.histogram(each, edges)
            axes.stairs(counts, edges, fill=True, color=colour(place), alpha=0.15)
            axes.stairs(counts, edges, color=colour(place))
            axes.axvline(each.mean(), color=colour(place), linewidth=1.3, linestyle=":")
        axes.axvline(0, color=INK, linewidth=1, linestyle="--")
        axes.set_title("Difference: number of prompts")
    return figure


def _height(models: int) -> float:
    return max(2.0, 0.9 + 0.32 * models)


def _whiskers(estimate: Estimate) -> np.ndarray:
    """Returns the lengths (2, 1) of the interval left and right of the mean."""
    low, high = estimate.mean - estimate.low, estimate.high - estimate.mean
    return np.array([[low], [high]]).clip(min=0)  # rounding may leave -1e-17


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), shortened(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
