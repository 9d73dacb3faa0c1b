"""Tests the paper's claims in miniature: several seeds of every arm of a table on the tiny world."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import torch
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tqdm import tqdm

from spo.command_line.config_files import leaves, load_config
from spo.data.prompts import read_prompts
from spo.method.build import read_recipe
from spo.method.start import train
from spo.run.folder import METRICS
from spo.run.tables import markdown_table
from spo.tiny_world.evaluation import Bench, Verdict

FLIPPED = "preferences flipped at random"
# The changes of each arm to config/tiny.py; arm_config adds those of FLIPPED and "official".
ARMS = {
    "GradSPO": {},
    "SPO": {"algorithm": "spo"},
    FLIPPED: {"preference.scorer": "spo.tiny_world.preferences:flipped_preferences"},
    "ema_decay 0": {"train.ema_decay": 0.0},
    "ema_decay 0.5": {"train.ema_decay": 0.5},
    "ema_decay 0.99": {"train.ema_decay": 0.99},
    "grad_scale 0.25": {"train.grad_scale": 0.25},
    "grad_scale 1": {"train.grad_scale": 1.0},
    "K = 2": {"sample.num_candidates": 2},
    "K = 8": {"sample.num_candidates": 8},
    "threshold 0": {"sample.threshold": 0.0},
    "threshold 0.5": {"sample.threshold": 0.5},
    "tiny decoder": {"sample.decoder": "assets/tiny/decoder"},
    "predictions of the rollout": {"train.ema_prediction": "rollout"},
    "no clips, no EMA pass": {"train.ema_prediction": "none", "train.clip_eps": None},
    "official": {},
}
PROMPTS = 64  # of each run: eight rollouts of eight
QUICK = ("GradSPO", "SPO", FLIPPED, "ema_decay 0", "grad_scale 1", "K = 2", "official")
OFFICIAL = "config/official/sd15.py"
# Student's t at 97.5 % for 2 to 10 seeds: half the width of an interval in standard errors.
STUDENT = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2))
MEASURES = ("quality", "win_rate", "faithful", "updates")


def reproduce(arms: Sequence[str], seeds: int, out: Path, processes: int) -> str:
    """Runs every arm with every seed, and returns the table in Markdown.

    Each (arm, seed) is a run under `out` and is kept: another call continues the runs. Writes
    results.json, table.md and results.png there.
    """
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    results = _run_all(jobs, out, processes)
    rows = {arm: summarise([results[arm, seed] for seed in range(seeds)]) for arm in arms}
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = as_table(rows)
    (out / "table.md").write_text(table)
    plot(rows, out / "results.png")
    return table


def _run_all(jobs: Sequence[tuple[str, int]], out: Path, processes: int) -> dict:
    """Returns the result of each (arm, seed), made in several processes of one thread each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    results = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(run, arm, seed, out): (arm, seed) for arm, seed in jobs}
        for done in tqdm(as_completed(waiting), total=len(jobs), desc="runs"):
            results[waiting[done]] = done.result()
    return results


def run(arm: str, seed: int, out: Path) -> dict:
    """Trains and judges one arm with one seed, or reads the result of an earlier call."""
    folder = out / arm.replace(" ", "_").replace("=", "") / f"seed_{seed}"
    result = folder / "result.json"
    if not result.exists():
        train(arm_config(arm, seed, folder))
        result.write_text(json.dumps(judge(folder)) + "\n")
    return json.loads(result.read_text())


def arm_config(arm: str, seed: int, folder: Path) -> ConfigDict:
    """Returns config/tiny.py with the changes of an arm."""
    config = load_config("config/tiny.py")
    changes = dict(ARMS[arm])
    if arm == FLIPPED:
        own = {name: config.preference[name] for name in ("checkpoint", "backbone")}
        changes["preference.kwargs"] = own | {"seed": seed}
    if arm == "official":
        paper, official = (leaves(load_config(f)) for f in ("config/sd15.py", OFFICIAL))
        changes = {key: value for key, value in official.items() if value != paper[key]}
    changes |= {"seed": seed, "logdir": str(folder.parent), "run_name": folder.name}
    changes |= {"resume_from": "auto", "eval_interval": 0, "prompts.num": PROMPTS}
    config.update_from_flattened_dict(changes)
    return config


def judge(folder: Path) -> dict:
    """Compares a run's LoRA with the base model on the held-out captions."""
    verdict = Verdict.of(bench().base, bench().score(folder))
    last = json.loads((folder / METRICS).read_text().splitlines()[-1])
    return {
        "quality": verdict.difference.mean,
        "win_rate": verdict.win_rate.mean,
        "faithful": verdict.faithfulness.mean,
        "updates": last["step"],
    }


@cache
def bench() -> Bench:
    """Returns the base model with its images of the held-out captions, made once per process."""
    recipe = read_recipe(load_config("config/tiny.py"))
    prompts = read_prompts("assets/tiny/prompts/held_out.txt").prompts
    backbone = recipe.load_backbone(torch.device("cpu"))
    lora = recipe.lora.add_to(backbone.unet, seed=0)
    return Bench(backbone, lora, prompts, recipe.validation.images)


def summarise(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns each measure's mean over seeds, and half the width of its 95 % interval (Student's t)."""
    summary = {"seeds": len(results)}
    for name in MEASURES:
        values = [result[name] for result in results]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        summary[name] = mean
        summary[f"{name}_interval"] = STUDENT[len(values)] * math.sqrt(variance / len(values))
    return summary


def as_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the results as a Markdown table."""
    cells = []
    for arm, row in rows.items():
        mean = {name: (row[name], row[f"{name}_interval"]) for name in MEASURES}
        (gain, width), (wins, wins_width) = mean["quality"], mean["win_rate"]
        faithful, faithful_width = mean["faithful"]
        cells.append(
            [
                arm,
                f"{gain:+.2f} ± {width:.2f}",
                f"{100 * wins:.1f} ± {100 * wins_width:.1f}",
                f"{100 * faithful:+.1f} ± {100 * faithful_width:.1f}",
                f"{row['updates']:.0f}",
            ]
        )
    head = ["arm", "quality against base", "win rate, %", "faithfulness against base, points"]
    return markdown_table([*head, "updates"], cells)


def plot(rows: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Draws quality and faithfulness of every arm against the base, with intervals."""
    figure = Figure(figsize=(10, 0.4 * len(rows) + 1.2), layout="constrained")
    titles = (("quality", 1, "quality, points"), ("faithful", 100, "faithfulness, points of %"))
    for axes, (name, scale, title) in zip(figure.subplots(1, 2, sharey=True), titles, strict=True):
        means = [scale * row[name] for row in rows.values()]
        errors = [scale * row[f"{name}_interval"] for row in rows.values()]
        axes.barh(range(len(rows)), means, xerr=errors, color="#5b8dbf", capsize=3)
        axes.set_yticks(range(len(rows)), rows)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(f"{title}, against the base", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    figure.savefig(file, dpi=110)
