"""Compares judges of pixels and of latents on the tiny world by what a gain in quality costs."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from spo.atomic import replacing, write_json
from spo.command_line.config_files import load_config
from spo.costs.benchmark import Work, count_work
from spo.costs.load import load_models
from spo.costs.meter import ROLLOUT, TRAINING
from spo.evaluation.figures import colour, style
from spo.method.build import read_recipe
from spo.method.start import train
from spo.run.checkpoint_folder import checkpoints, read_state
from spo.run.folder import read_metrics
from spo.run.tables import markdown_table
from spo.tiny_world.evaluation import compare
from spo.tiny_world.reproduce import CONFIGS, arm_config, bench, run_all, run_dir, summarise

ARMS = ("GradSPO", "SPO", *CONFIGS)
ROLLOUTS = 8  # all arms get the FLOPs, or the seconds, of so many of the first arm
GAIN = 1.0  # points of quality
COSTS = {"rollouts": "rollouts", "tflop": "TFLOP", "seconds": "seconds"}
# Of six rollouts: a cheaper arm needs more than ROLLOUTS for the same costs.
_EPOCHS = {"GradSPO": 2, "SPO": 2, "LPO": 3, "GradSPO on the LRM": 4}
# Other work on the machine only slows rollouts down: the fastest tenth tells what they take.
_FASTEST = 0.1
# COSTS so far, and "quality" and "faithful" against the base, at the start and at each checkpoint.
Curve = Mapping[str, Sequence[float]]


def compare_costs(seeds: int, out: Path, processes: int) -> str:
    """Runs ARMS with every seed, and returns the table in Markdown.

    Runs are kept as those of `reproduce` are. Writes curves.json and curves.png.
    """
    found = run_all(run_curve, ARMS, seeds, out / "curves", processes)
    curves = {arm: with_costs(runs, count_flops(arm)) for arm, runs in found.items()}
    budget = {
        cost: float(np.mean([np.interp(ROLLOUTS, c["rollouts"], c[cost]) for c in curves[ARMS[0]]]))
        for cost in COSTS
    }
    rows = {arm: summarise([read_off(c, budget) for c in of_arm]) for arm, of_arm in curves.items()}
    write_json(out / "curves.json", {"budget": budget, "table": rows, "curves": curves})
    draw(curves, out / "curves.png")
    return as_table(rows, budget)


def run_curve(arm: str, seed: int, out: Path) -> dict[str, list[float]]:
    """Trains one arm with one seed and compares each checkpoint with the base, or reads the result.

    Returns rollouts, pairs and gains up to each checkpoint, and the seconds of all rollouts and pairs.
    """
    folder = run_dir(out, arm, seed)
    result = folder / "curve.json"
    if not result.exists():
        config = arm_config(arm, seed, folder)
        changes = {"prompts.num": 48, "num_epochs": _EPOCHS[arm]}
        changes |= {"save_every_rollouts": 4, "save_interval": 9, "checkpoint_limit": 0}
        config.update_from_flattened_dict(changes)
        train(config)
        lines, points = read_metrics(folder), [(0, 0, 0.0, 0.0)]
        for checkpoint in checkpoints(folder):
            rollouts = read_state(checkpoint)["position"]["rollouts"]
            verdict = compare(bench().base, bench().score(checkpoint))
            gains = verdict.difference.mean, verdict.faithfulness.mean
            points.append((rollouts, sum(line["pairs"] for line in lines[:rollouts]), *gains))
        names = ("rollouts", "pairs", "quality", "faithful")
        run = dict(zip(names, zip(*points, strict=True), strict=True))
        run["seconds_rollout"] = [line["seconds_rollout"] for line in lines]
        run["seconds_pair"] = [line["seconds_train"] / line["pairs"] for line in lines]
        write_json(result, run)
    return json.loads(result.read_text())


def count_flops(arm: str) -> Work:
    """Returns the work of an iteration of an arm with one prompt."""
    config = arm_config(arm, 0, Path("unused/run"))
    config.sample.global_batch_size = config.sample.batch_size = 1
    return count_work(load_models(read_recipe(config), torch.device("cpu")))


def with_costs(runs: Sequence[Mapping[str, Sequence[float]]], work: Work) -> list[Curve]:
    """Returns the curves of the runs of one arm."""
    prompts = load_config("config/tiny.py").sample.batch_size
    flops = prompts / work.prompts * work.flops[ROLLOUT], work.flops[TRAINING] / work.pairs
    seconds = [
        np.quantile(np.concatenate([run[name] for run in runs]), _FASTEST)
        for name in ("seconds_rollout", "seconds_pair")
    ]
    curves = []
    for run in runs:
        rollouts, pairs = np.array(run["rollouts"]), np.array(run["pairs"])
        curve = {name: run[name] for name in ("rollouts", "quality", "faithful")}
        curve["tflop"] = ((rollouts * flops[0] + pairs * flops[1]) / 1e12).tolist()
        curve["seconds"] = (rollouts * seconds[0] + pairs * seconds[1]).tolist()
        curves.append(curve)
    return curves


def read_off(curve: Curve, budget: Mapping[str, float]) -> dict[str, float]:
    """Returns quality and faithfulness against the base at each cost of `budget`, and costs of GAIN.

    NaN past the curve's end. Between the points the curve is straight. A gain counts as reached once it
    was reached.
    """
    best, found = np.maximum.accumulate(curve["quality"]), {}
    for cost, value in budget.items():
        for gain in ("quality", "faithful"):
            found[f"{gain}_{cost}"] = np.interp(value, curve[cost], curve[gain], right=np.nan)
        found[f"until_{cost}"] = np.interp(GAIN, best, curve[cost], right=np.nan)
    return {name: float(value) for name, value in found.items()}


def as_table(rows: Mapping[str, Mapping[str, float]], budget: Mapping[str, float]) -> str:
    """Returns the results as a Markdown table."""
    equal = [f"at {budget[cost]:.3g} {unit}" for cost, unit in COSTS.items()]
    needed = [f"{unit} to {GAIN:+.1f}" for unit in COSTS.values()]

    def cell(row: Mapping[str, float], name: str, form: str, scale: float = 1.0) -> str:
        mean, half = scale * row[name], scale * row[f"{name}_interval"]
        return f"{mean:{form}} ± {half:{form.lstrip('+')}}"

    cells = [
        [
            arm,
            *(cell(row, f"quality_{cost}", "+.2f") for cost in COSTS),
            *(cell(row, f"until_{cost}", ".1f") for cost in COSTS),
            cell(row, "faithful_seconds", "+.1f", 100),
        ]
        for arm, row in rows.items()
    ]
    return markdown_table(["arm", *equal, *needed, f"faithful, points, {equal[-1]}"], cells)


def draw(curves: Mapping[str, Sequence[Curve]], path: Path) -> None:
    """Draws quality and faithfulness over each cost: means over the seeds, and 95 % intervals."""
    gains = {"quality": "quality against base", "faithful": "faithful against base"}
    with style():
        figure = Figure(figsize=(10, 5), layout="constrained")
        panels = figure.subplots(len(gains), len(COSTS), sharex="col", sharey="row")
        for row, gain in zip(panels, gains, strict=True):
            row[0].set_ylabel(gains[gain])
            for (axes, cost), i in product(zip(row, COSTS, strict=True), range(len(curves))):
                arm, found = list(curves.items())[i]
                x = np.mean([curve[cost] for curve in found], axis=0)
                points = zip(*(curve[gain] for curve in found), strict=True)
                sums = [summarise([{"gain": value} for value in point]) for point in points]
                y, half = (np.array([s[name] for s in sums]) for name in ("gain", "gain_interval"))
                axes.plot(x, y, label=arm, color=colour(i + 1))
                axes.fill_between(x, y - half, y + half, color=colour(i + 1), alpha=0.15, lw=0)
        for axes, unit in zip(panels[-1], COSTS.values(), strict=True):
            axes.set_xlabel(unit)
            axes.set_xlim(left=0)
        panels[0, -1].legend(loc="lower right")
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110, format="png")
