"""Makes one good run of the tiny world and four that are not, for docs/healthy_runs.md."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from ml_collections import ConfigDict

from spo.atomic import replacing, write_json
from spo.evaluation.figures import INK, colour, style
from spo.guard.checks import check
from spo.guard.expected import LOOK
from spo.guard.log import Log, open_log
from spo.method.start import train
from spo.run.tables import markdown_table
from spo.tiny_world.evaluation import compare
from spo.tiny_world.reproduce import FLIPPED, arm_config, bench, run_all, run_dir

# Each run: an arm of `reproduce`, and further changes.
RUNS: dict[str, tuple[str, dict]] = {
    "good": ("GradSPO", {}),
    "starved": ("GradSPO", {"sample.threshold": 0.5}),
    "collapsed": ("GradSPO", {"train.learning_rate": 1e-2}),
    "flipped": (FLIPPED, {}),
    "wrong model": (
        "GradSPO",
        {"preference.scorer": "spo.tiny_world.preferences:Darkness"},
    ),
}
# Title -> number, and what a dashed line stands at.
_PANELS = {
    "Loss": ("loss", math.log(2)),
    "Loss near ln 2": ("loss", math.log(2)),
    "Win ratio": ("win_ratio", 1.0),
    "Lose ratio": ("lose_ratio", 1.0),
    "Clipped share": ("clipped", None),
    "Pairs of a rollout": ("pairs", None),
    "Gradient norm": ("grad_norm", None),
    "Distance of EMA and policy": ("ema_distance", None),
    "LoRA norm": ("lora_norm", None),
    "Mean score, its change": ("score_mean", 0.0),
}
_LOG_SCALE = ("grad_norm", "ema_distance", "lora_norm")
_NEAR = (0.675, 0.711)
_COLUMNS = 5


def show_runs(out: Path, processes: int) -> str:
    """Makes the runs; returns a table of what became of them, and what check_run.py says of each.

    Runs are kept as those of `reproduce` are. Writes healthy_runs.png.
    """
    results = run_all(run, tuple(RUNS), 1, out / "healthy", processes)
    logs = {name: open_log(run_dir(out / "healthy", name, 0)) for name in RUNS}
    draw(logs, out / "healthy_runs.png")
    rows = []
    for name, (gains,) in results.items():
        looks = [row.name for row in check(logs[name]) if row.state == LOOK]
        changes = f"{gains['quality']:+.2f}", f"{100 * gains['faithful']:+.1f}"
        verdicts = [line["verdict"] for line in logs[name].evaluations]
        rows.append([name, *changes, ", ".join(looks) or "nothing", *verdicts[-1:]])
    head = ["run", "quality", "faithful, points", "check_run.py: look at", "verdict after training"]
    return markdown_table(head, rows)


def run(name: str, seed: int, out: Path) -> dict[str, float]:
    """Trains one of RUNS and compares it with the base, or reads an earlier result."""
    folder = run_dir(out, name, seed)
    result = folder / "result.json"
    if not result.exists():
        train(run_config(name, seed, folder))
        verdict = compare(bench().base, bench().score(folder))
        gains = {"quality": verdict.difference.mean, "faithful": verdict.faithfulness.mean}
        write_json(result, gains)
    return json.loads(result.read_text())


def run_config(name: str, seed: int, folder: Path) -> ConfigDict:
    """Returns the config of one of RUNS: two epochs of eight rollouts."""
    arm, changes = RUNS[name]
    config = arm_config(arm, seed, folder)
    config.update_from_flattened_dict(changes | {"num_epochs": 2, "eval_interval": 1})
    return config


def draw(logs: Mapping[str, Log], path: Path) -> None:
    """Draws numbers of several runs over their rollouts."""
    with style():
        rows = -(-len(_PANELS) // _COLUMNS)
        figure = Figure(figsize=(2.9 * _COLUMNS, 2.5 * rows), layout="constrained")
        panels = figure.subplots(rows, _COLUMNS).flat
        for (title, (key, dashed)), axes in zip(_PANELS.items(), panels, strict=True):
            axes.set_title(title)
            for i, (name, log) in enumerate(logs.items(), start=1):
                known = [line for line in log.lines if line.get(key) is not None]
                start = known[0][key] if key == "score_mean" else 0
                values = [line[key] - start for line in known]
                axes.plot([line["rollout"] for line in known], values, label=name, color=colour(i))
            if dashed is not None:
                axes.axhline(dashed, color=INK, linewidth=1, linestyle="--")
            if key in _LOG_SCALE:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("")
        panels[list(_PANELS).index("Loss near ln 2")].set_ylim(*_NEAR)
        figure.supxlabel("rollouts", fontsize=9)
        names = panels[0].get_legend_handles_labels()
        figure.legend(*names, loc="outside upper center", ncols=len(logs))
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
