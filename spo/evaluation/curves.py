"""Training curves of a run, drawn from the lines of its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spo.evaluation.figures import COLOURS, INK, style
from spo.run.folder import read_metrics

_DENSE = 100  # points; longer series are drawn with their running mean
_HEAT = LinearSegmentedColormap.from_list("heat", [COLOURS[1] + "00", COLOURS[1] + "ff"])
_IN_ORDER = LinearSegmentedColormap.from_list("in order", [COLOURS[1], COLOURS[4], COLOURS[2]])


@dataclass(frozen=True)
class Panel:
    """A diagram of some metrics over the updates."""

    title: str
    keys: Mapping[str, str]  # keys of a line of metrics.jsonl, with their labels
    from_zero: bool = False
    reference: float | None = None  # a line across: the value of a model that learned nothing
    heat: bool = False  # numbers by timestep, as shades over the rollouts


TRAINING = (
    Panel("Loss", {"loss": ""}, reference=math.log(2)),
    Panel("Mean score of the candidates", {"score_mean": ""}),
    Panel("Likelihood ratios", {"win_ratio": "win", "lose_ratio": "lose"}, reference=1.0),
    Panel("Pairs of a rollout", {"pairs": ""}, from_zero=True),
    Panel("Pairs by timestep", {"pairs_at": ""}, heat=True),
    Panel("Gradient norm", {"grad_norm": ""}, from_zero=True),
    Panel("Win margin of the best candidate", {"win_margin": ""}, from_zero=True),
    Panel("Clipped share of the ratios", {"clipped": ""}, from_zero=True),
    Panel("Distance of EMA and policy", {"ema_distance": ""}, from_zero=True),
    Panel(
        "Seconds per rollout",
        {"seconds_rollout": "rollout", "seconds_train": "training on its pairs"},
        from_zero=True,
    ),
    Panel("Peak memory, GiB", {"peak_memory_gib": ""}, from_zero=True),
)
PREFERENCE = (
    Panel("Accuracy on the validation pairs", {"accuracy": "t"}, reference=0.5),
    Panel("Training loss", {"loss": ""}),
    Panel("Accuracy on the training pairs", {"training_accuracy": ""}, reference=0.5),
    Panel("Gradient norm", {"grad_norm": ""}, from_zero=True),
    Panel("Pairs per second", {"pairs_per_second": ""}, from_zero=True),
    Panel("Peak memory, GiB", {"peak_memory_gib": ""}, from_zero=True),
)


def draw_accuracy(run_dir: Path) -> Path:
    """Writes accuracy.png into the `run_dir` of a preference model: accuracy per timestep, and loss."""
    return _draw(run_dir, PREFERENCE[:2], columns=2, name="accuracy.png")


def draw_curves(run_dir: Path) -> Path:
    """Writes curves.png into `run_dir`: each metric over the updates."""
    return _draw(run_dir, TRAINING, columns=4, name="curves.png")


def panels_of(lines: Sequence[Mapping]) -> list[Panel]:
    """Returns the panels of a training run, or of a preference model's, that `lines` have data for."""
    panels = TRAINING if "rollout" in lines[0] else PREFERENCE
    return [panel for panel in panels if any(_series(lines, key) for key in panel.keys)]


def draw_panel(axes: Axes, lines: Sequence[Mapping], panel: Panel) -> None:
    """Draws `panel` of the metrics `lines`; inside `style()`."""
    axes.set_title(panel.title)
    if panel.heat:
        _draw_heat(axes, lines, next(iter(panel.keys)))
        return
    series = _labelled(lines, panel)
    in_order = _IN_ORDER(np.linspace(0, 1, len(series)))
    shades = in_order if len(series) > 2 else COLOURS[1:]
    for (label, points), shade in zip(series.items(), shades, strict=False):
        _draw_line(axes, points, label, shade)
    if panel.from_zero and series:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax or 1)
    if panel.reference is not None:
        axes.axhline(panel.reference, color=INK, linewidth=1, linestyle="--")
    if len(series) > 1:
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axes.legend(**(beside if len(series) > 2 else {}))
    axes.set_xlabel("updates")


def _draw(run_dir: Path, panels: Sequence[Panel], columns: int, name: str) -> Path:
    lines = read_metrics(run_dir)
    rows = -(-len(panels) // columns)
    with style():
        figure = Figure(figsize=(3.7 * columns, 2.8 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for panel, axes in zip(panels, grid, strict=False):
            draw_panel(axes, lines, panel)
        for axes in grid:  # the unused ones
            axes.remove()
        path = run_dir / name
        figure.savefig(path, dpi=110)
    return path


def _series(lines: Sequence[Mapping], key: str) -> dict[str, list[tuple[int, float]]]:
    """Returns (updates, value) of the known values: one series, or one for each entry of a dict."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        value = line.get(key)
        for name, number in (value if isinstance(value, dict) else {"": value}).items():
            if number is not None:
                found.setdefault(name, []).append((line["step"], number))
    return found


def _labelled(lines: Sequence[Mapping], panel: Panel) -> dict[str, list[tuple[int, float]]]:
    return {
        f"{label} = {name}" if name else label: points
        for key, label in panel.keys.items()
        for name, points in _series(lines, key).items()
    }


def _draw_line(
    axes: Axes, points: Sequence[tuple[int, float]], label: str, shade: str | np.ndarray
) -> None:
    steps, values = np.array(points, dtype=float).T
    if len(steps) <= _DENSE:
        axes.plot(steps, values, ".-", label=label, color=shade, markersize=4)
        return
    axes.plot(steps, values, linewidth=0.6, alpha=0.35, color=shade)
    size = len(steps) // 25
    means = [np.convolve(each, np.full(size, 1 / size), "valid") for each in (steps, values)]
    axes.plot(*means, color=shade, label=label)


def _draw_heat(axes: Axes, lines: Sequence[Mapping], key: str) -> None:
    """Draws timesteps from noise (top) to image, and rollouts from left to right."""
    known = [line for line in lines if line.get(key)]
    timesteps = sorted(known[0][key], key=int, reverse=True)
    numbers = np.array([[line[key][t] for line in known] for t in timesteps])
    extent = (known[0]["rollout"] - 0.5, known[-1]["rollout"] + 0.5, len(timesteps) - 0.5, -0.5)
    image = axes.imshow(
        numbers, cmap=_HEAT, vmin=0, aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.figure.colorbar(image, ax=axes).outline.set_visible(False)
    axes.set_yticks(range(0, len(timesteps), 3), timesteps[::3])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    axes.set(xlabel="rollouts", ylabel="t")
