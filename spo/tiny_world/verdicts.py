"""Holds the verdicts of runs on the tiny world against a quality that no run and no judge sees."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from spo.atomic import write_json
from spo.command_line.config_files import load_config
from spo.data.prompts import read_prompts
from spo.guard.log import evaluations
from spo.guard.verdict import OVEROPTIMISED, WORSE
from spo.method.build import read_recipe
from spo.method.start import train
from spo.run.checkpoint_folder import checkpoints
from spo.run.folder import read_metrics
from spo.run.tables import markdown_table
from spo.tiny_world.evaluation import Bench
from spo.tiny_world.reproduce import FLIPPED, arm_config, run_all, run_dir

# Each run: an arm of `reproduce`, and further changes. The rate of config/tiny.py is 5e-4.
RUNS: dict[str, tuple[str, dict]] = {
    "healthy": ("GradSPO", {"train.learning_rate": 2e-4}),
    "pushed": ("GradSPO", {"train.learning_rate": 1e-3}),
    "flipped": (FLIPPED, {}),
    "wrong model": ("GradSPO", {"preference.scorer": "spo.tiny_world.preferences:Darkness"}),
}
_EPOCHS, _PROMPTS = 8, 32  # of a run, and of an epoch: four rollouts
_JUDGED = 64  # the first held-out captions; the hidden quality is that of the last _HIDDEN
_HIDDEN = 100


def compare_verdicts(seeds: int, out: Path, processes: int) -> str:
    """Makes every run with every seed; returns a table of verdicts and hidden quality in Markdown.

    Runs are kept as those of `reproduce` are. Writes verdicts.json.
    """
    found = run_all(run, tuple(RUNS), seeds, out / "verdicts", processes)
    write_json(out / "verdicts.json", found)
    head = ["run", "seed", "hidden quality by epoch", "peak", "over-optimised from", "shipped"]
    rows = [
        [name, seed, *_cells(each)]
        for name, runs in found.items()
        for seed, each in enumerate(runs)
    ]
    return markdown_table([*head, "of the peak's gain", "epochs called healthy"], rows)


def run(name: str, seed: int, out: Path) -> dict[str, Any]:
    """Trains one of RUNS, and adds the hidden quality of each epoch; or reads an earlier result."""
    folder = run_dir(out, name, seed)
    result = folder / "verdicts.json"
    if not result.exists():
        arm, changes = RUNS[name]
        config = arm_config(arm, seed, folder)
        sizes = {"num_epochs": _EPOCHS, "prompts.num": _PROMPTS, "eval.num_judged": _JUDGED}
        sizes |= {"checkpoint_limit": 0, "eval_interval": 1}
        config.update_from_flattened_dict(changes | sizes)
        train(config)
        lines = evaluations(read_metrics(folder))
        base = hidden_bench().base.quality
        qualities = [hidden_bench().score(each).quality - base for each in checkpoints(folder)]
        measures = {
            "quality": [0.0, *(float(each.mean()) for each in qualities)],
            "verdicts": [line["verdict"] for line in lines],
            "ship": lines[-1]["ship"],
            "texts": [line["text"] for line in lines],
        }
        write_json(result, measures)
    return json.loads(result.read_text())


@cache
def hidden_bench() -> Bench:
    """Returns the base model with its images of captions that no judge sees, once per process."""
    prompts = read_prompts("assets/tiny/prompts/held_out.txt").prompts
    return Bench(read_recipe(load_config("config/tiny.py")), prompts[-_HIDDEN:])


def _cells(measured: Mapping[str, Any]) -> Sequence[object]:
    quality, statuses = measured["quality"], measured["verdicts"]
    peak = int(np.argmax(quality))
    bad = [epoch for epoch, each in enumerate(statuses, 1) if each in (OVEROPTIMISED, WORSE)]
    share = quality[measured["ship"]] / quality[peak] if peak else None
    return (
        " ".join(f"{each:+.2f}" for each in quality[1:]),
        peak,
        bad[0] if bad else "never",
        measured["ship"],
        f"{100 * share:.0f} %" if share is not None else "",
        f"{statuses.count('healthy')} of {len(statuses)}",
    )
