"""Curves and report.html of a training run, from the files in its directory."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spo.atomic import replacing, whole_lines
from spo.errors import UserError
from spo.evaluation import page
from spo.evaluation.figures import COLOURS, INK, colour, panel_axes, style, to_svg
from spo.evaluation.health_figures import health_figures
from spo.guard.log import evaluations
from spo.publish.record import public_values
from spo.run.folder import CONFIG, REPORT, STARTS, read_metrics

Points = list[tuple[int, float]]  # updates and value
_DENSE = 100  # points; longer series are drawn with their running mean
_COLUMNS = 4  # of curves.png
_GRID = (1280, 4096)  # pixels, width and height
_HEAT = LinearSegmentedColormap.from_list("heat", [COLOURS[1] + "00", COLOURS[1] + "ff"])


@dataclass(frozen=True)
class Panel:
    """A diagram of some metrics over the updates."""

    title: str
    keys: Mapping[str, str]  # keys of a line of metrics.jsonl, with their labels
    from_zero: bool = False
    dashed: tuple[str, float] | None = None  # what a line across stands for, and its value
    heat: bool = False  # numbers by timestep, as shades over the rollouts
    log: bool = False  # shades by the logarithm of the number


TRAINING = (
    Panel("Loss", {"loss": ""}, dashed=("nothing learned", math.log(2))),
    Panel("Mean score of the candidates", {"score_mean": ""}),
    Panel(
        "Likelihood ratios",
        {"win_ratio": "win", "lose_ratio": "lose"},
        dashed=("nothing learned", 1.0),
    ),
    Panel("Pairs of a rollout", {"pairs": ""}, from_zero=True),
    Panel("Pairs by timestep", {"pairs_at": ""}, heat=True),
    Panel("Gradient norm", {"grad_norm": ""}, from_zero=True),
    Panel("Win margin of the best candidate", {"win_margin": ""}, from_zero=True),
    Panel("Clipped share of the ratios", {"clipped": ""}, from_zero=True),
    Panel("KL from the reference, nats", {"kl_at": ""}, heat=True, log=True),
    Panel("Relative norm of the LoRA", {"lora_norm": ""}, from_zero=True),
    Panel("Distance of EMA and policy", {"ema_distance": ""}, from_zero=True),
    Panel("Seconds per rollout", {"seconds_rollout": "rollout", "seconds_train": "training"}, True),
    Panel("Peak memory, GiB", {"peak_memory_gib": ""}, from_zero=True),
)
PREFERENCE = (
    Panel("Accuracy on the validation pairs", {"accuracy": "t"}, dashed=("chance", 0.5)),
    Panel("Training loss", {"loss": ""}),
    Panel("Accuracy on the training pairs", {"training_accuracy": ""}, dashed=("chance", 0.5)),
    Panel("Gradient norm", {"grad_norm": ""}, from_zero=True),
    Panel("Pairs per second", {"pairs_per_second": ""}, from_zero=True),
    Panel("Peak memory, GiB", {"peak_memory_gib": ""}, from_zero=True),
)


def draw_curves(run_dir: Path) -> Path:
    """Writes each metric over the updates: curves.png, or accuracy.png of a preference model."""
    lines = read_metrics(run_dir)
    panels = panels_of(lines)  # none at the start of a preference model that sees only ties
    columns, rows = min(len(panels), _COLUMNS) or 1, -(-len(panels) // _COLUMNS) or 1
    path = run_dir / ("curves.png" if "rollout" in lines[0] else "accuracy.png")
    with style():
        figure = Figure(figsize=(3.7 * columns, 2.8 * rows), layout="constrained")
        for place, panel in enumerate(panels, start=1):
            _draw_panel(figure.add_subplot(rows, columns, place), lines, panel)
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
    return path


def write_run_report(run_dir: Path) -> Path:
    """Writes report.html of a run; raises UserError if a file is damaged, or metrics are missing."""
    lines = read_metrics(run_dir)
    try:
        config = json.loads((run_dir / CONFIG).read_text())
        starts = [json.loads(line) for line in whole_lines(run_dir / STARTS)]
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir}: cannot read {CONFIG} or {STARTS} ({error}).") from error
    svgs = []
    for panel in panels_of(lines):
        with style():
            figure, axes = panel_axes()
            _draw_panel(axes, lines, panel)
        svgs.append(to_svg(figure, panel.title))
    pictures, found = sorted((run_dir / "validation").glob("*.png")), evaluations(lines)
    return page.write_page(
        run_dir / REPORT,
        "run_report.html.j2",
        title=run_dir.resolve().name,
        config=public_values(config),
        starts=[s | {"command": shlex.join(public_values(s["command"]))} for s in starts],
        totals=_totals(lines),
        curves=svgs,
        evaluations=found,
        health=health_figures(found) if found else [],
        slides={picture.stem: page.embedded_image(picture, _GRID) for picture in pictures},
    )


def panels_of(lines: Sequence[Mapping]) -> list[Panel]:
    """Returns the panels of a training run, or of a preference model's, that `lines` have data for."""
    panels = TRAINING if "rollout" in lines[0] else PREFERENCE
    return [panel for panel in panels if _series(lines, panel)]


def _series(lines: Sequence[Mapping], panel: Panel) -> dict[str, Points]:
    """Returns the known values of `panel` by label, each entry of a dict as a series of its own."""
    found: dict[str, Points] = {}
    for line, (key, label) in product(lines, panel.keys.items()):
        value = line.get(key)
        for name, number in (value if isinstance(value, dict) else {"": value}).items():
            if number is not None:
                points = found.setdefault(f"{label} = {name}" if name else label, [])
                points.append((line["step"], number))
    return found


def _draw_panel(axes: Axes, lines: Sequence[Mapping], panel: Panel) -> None:
    axes.set_title(panel.title)
    if panel.heat:
        _draw_heat(axes, lines, panel)
        return
    series = _series(lines, panel)
    for i, (label, points) in enumerate(series.items(), start=1):
        _draw_line(axes, points, label, colour(i))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("updates")
    if panel.dashed is not None:
        name, value = panel.dashed
        axes.axhline(value, color=INK, linewidth=1, linestyle="--")
        axes.set_xlabel(f"updates  (dashed: {name})")
    if len(series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _draw_line(axes: Axes, points: Points, label: str, shade: str) -> None:
    steps, values = np.array(points, dtype=float).T
    if len(steps) <= _DENSE:
        axes.plot(steps, values, ".-", label=label, color=shade, markersize=4)
        return
    axes.plot(steps, values, linewidth=0.6, alpha=0.35, color=shade)
    size = len(steps) // 25
    means = [np.convolve(each, np.full(size, 1 / size), "valid") for each in (steps, values)]
    axes.plot(*means, color=shade, label=label)


def _draw_heat(axes: Axes, lines: Sequence[Mapping], panel: Panel) -> None:
    (key,) = panel.keys
    lines = [line for line in lines if key in line]
    # From noise at the top to image at the bottom, rollouts from left to right.
    timesteps = sorted({t for line in lines for t in line[key]}, key=int, reverse=True)
    numbers = np.array([[line[key].get(t, np.nan) for line in lines] for t in timesteps])
    extent = (lines[0]["rollout"] - 0.5, lines[-1]["rollout"] + 0.5, len(timesteps) - 0.5, -0.5)
    image = axes.imshow(
        numbers,
        cmap=_HEAT,
        # Linear below 0.001, as 0 has no logarithm.
        norm=AsinhNorm(1e-3, vmin=0) if panel.log else Normalize(vmin=0),
        aspect="auto",
        extent=extent,
        interpolation="nearest",
    )
    axes.figure.colorbar(image, ax=axes, format="%g").outline.set_visible(False)
    axes.set_yticks(range(0, len(timesteps), 3), timesteps[::3])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False)
    axes.set(xlabel="rollouts", ylabel="t")


def _totals(lines: Sequence[Mapping[str, Any]]) -> dict[str, int | str | None]:
    last = lines[-1]
    seconds = sum(line.get("seconds_rollout", 0) + line.get("seconds_train", 0) for line in lines)
    return {
        "epochs": last.get("epoch"),
        "rollouts": last.get("rollout"),
        "updates": last["step"],
        "skipped updates": sum(line.get("skipped_updates", 0) for line in lines),
        "pairs": sum(line.get("pairs", 0) for line in lines),
        "time": str(timedelta(seconds=round(seconds))) if seconds else None,
        "peak memory": f"{max(line.get('peak_memory_gib', 0) for line in lines):.1f} GiB",
    }
