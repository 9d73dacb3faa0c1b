"""Figures of a run's own evaluations: reward, judges and pixels over the epochs."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from spo.evaluation.figures import INK, colour, panel_axes, style, to_svg
from spo.guard.verdict import HEALTHY, SHARES


def health_figures(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns figures of evaluations (`spo.guard.log`) as SVG: reward, each judge, and pixels.

    A line marks the epoch to ship, and a cross each epoch whose verdict is not "healthy".
    """
    figures = []
    named = {"Reward: the training scorer": [line.get("reward") for line in found]}
    for name in dict.fromkeys(name for line in found for name in line["judges"]):
        named[f"Judge: {name}"] = [line["judges"].get(name) for line in found]
    for title, estimates in named.items():
        if any(estimates):
            figures.append(_figure(title, found, partial(_draw_band, found, estimates)))
    changes = {name: [line["pixels"].get(name) for line in found] for name in found[-1]["pixels"]}
    relative = {name: each for name, each in changes.items() if name not in SHARES}
    figures.append(
        _figure("Pixels: times the untrained", found, partial(_draw_ratios, found, relative))
    )
    for name in SHARES:
        title = f"Share of pixels that are {name}"
        figures.append(_figure(title, found, partial(_draw_share, found, changes[name])))
    return figures


def _figure(title: str, found: Sequence[Mapping], draw: Callable[[Axes], None]) -> str:
    with style():
        figure, axes = panel_axes()
        axes.set_title(title)
        draw(axes)
        ship = found[-1]["ship"]
        axes.set_xlabel("epochs")
        if ship:
            axes.axvline(ship, color=INK, linewidth=1, linestyle=":")
            axes.set_xlabel(f"epochs  (dotted: {ship}, to ship)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return to_svg(figure, title)


def _draw_band(
    found: Sequence[Mapping], estimates: Sequence[Mapping[str, float] | None], axes: Axes
) -> None:
    """Draws differences to the untrained model with their intervals."""
    known = [(line, each) for line, each in zip(found, estimates, strict=True) if each]
    epochs = [0, *(line["evaluation"] for line, _ in known)]
    low, mean, high = ([0.0, *(each[k] for _, each in known)] for k in ("low", "mean", "high"))
    axes.fill_between(epochs, low, high, color=colour(1), alpha=0.15, linewidth=0)
    axes.plot(epochs, mean, ".-", color=colour(1), markersize=4)
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    for line, each in known:
        if line["verdict"] != HEALTHY:
            axes.plot(line["evaluation"], each["mean"], "x", color=colour(7), markersize=6)


def _draw_ratios(
    found: Sequence[Mapping], changes: Mapping[str, Sequence[Mapping | None]], axes: Axes
) -> None:
    for place, (name, each) in enumerate(changes.items(), start=1):
        epochs = [
            0,
            *(line["evaluation"] for line, change in zip(found, each, strict=True) if change),
        ]
        ratios = [1.0, *(c["now"] / (c["untrained"] or 1.0) for c in each if c)]
        axes.plot(
            epochs, ratios, ".-", color=colour(place), markersize=4, label=name.replace("_", " ")
        )
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_share(found: Sequence[Mapping], changes: Sequence[Mapping | None], axes: Axes) -> None:
    known = [(line["evaluation"], each) for line, each in zip(found, changes, strict=True) if each]
    values = [known[0][1]["untrained"], *(each["now"] for _, each in known)]
    axes.plot([0, *(epoch for epoch, _ in known)], values, ".-", color=colour(1), markersize=4)
    axes.set_ylim(bottom=0)
