"""Training curves of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from spo.tracking import METRICS

matplotlib.use("agg")

_CURVES = (  # title, keys of a line of metrics
    ("loss", ("loss",)),
    ("mean score of the candidates", ("score_mean",)),
    ("pairs of a rollout", ("pairs",)),
    ("likelihood ratios to the reference", ("win_ratio", "lose_ratio")),
    ("clipped share of the ratios", ("clipped",)),
    ("gradient norm", ("grad_norm",)),
)


def draw_accuracy(run_dir: Path) -> Path:
    """Write accuracy.png into the `run_dir` of a preference model: accuracy per timestep, and loss."""
    lines = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    measured = [line for line in lines if "accuracy" in line]
    figure = Figure(figsize=(11, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for timestep in measured[0]["accuracy"] if measured else ():
        known = [(line["step"], line["accuracy"][timestep]) for line in measured]
        known = [(step, value) for step, value in known if value is not None]
        accuracy.plot(*zip(*known, strict=True), ".-", label=f"t = {timestep}") if known else None
    known = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    loss.plot(*zip(*known, strict=True), ".-") if known else None
    for axes, title in ((accuracy, "accuracy on the validation pairs"), (loss, "training loss")):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    if accuracy.lines:
        accuracy.legend(fontsize=8)
    figure.supxlabel("optimizer steps", fontsize=10)
    path = run_dir / "accuracy.png"
    figure.savefig(path, dpi=110)
    return path


def draw_curves(run_dir: Path) -> Path:
    """Write curves.png into `run_dir`: each metric over the updates."""
    lines = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 3).flat, _CURVES, strict=True):
        for key in keys:
            known = [(line["step"], line[key]) for line in lines if line[key] is not None]
            axes.plot(*zip(*known, strict=True), ".-", label=key) if known else None
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize=8)
    figure.supxlabel("updates", fontsize=10)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    return path
