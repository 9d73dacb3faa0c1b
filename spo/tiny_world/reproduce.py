"""Tests the paper's claims in miniature: several seeds of every arm of a table on the tiny world."""

import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from tqdm import tqdm

from spo.atomic import write_json
from spo.command_line.config_files import leaves, load_config
from spo.data.prompts import read_prompts
from spo.method.build import read_recipe
from spo.method.start import train
from spo.run.folder import METRICS
from spo.run.tables import markdown_table
from spo.tiny_world.evaluation import Bench, compare

FLIPPED = "preferences flipped at random"
# Arms with a config of their own in place of config/tiny.py.
CONFIGS = {"LPO": "config/lpo_tiny.py", "GradSPO on the LRM": "config/gradspo_lrm_tiny.py"}
# The changes of each arm to its config; arm_config adds those of FLIPPED and "official".
ARMS = {
    "GradSPO": {},
    "SPO": {"algorithm": "spo"},
    FLIPPED: {"preference.scorer": "spo.tiny_world.preferences:FlippedPreferences"},
    "ema_decay 0": {"train.ema_decay": 0.0},
    "grad_scale 1": {"train.grad_scale": 1.0},
    "K = 2": {"sample.num_candidates": 2},
    "tiny decoder": {"sample.decoder": "assets/tiny/decoder"},
    "predictions of the rollout": {"train.ema_prediction": "rollout"},
    "no clips, no EMA pass": {"train.ema_prediction": "none", "train.clip_eps": None},
    "official": {},
    **{arm: {} for arm in CONFIGS},
}
QUICK = ("GradSPO", "SPO", FLIPPED, "ema_decay 0", "grad_scale 1", "K = 2", "official")
# Student's t at 97.5 % for 2 to 10 seeds: half the width of an interval in standard errors.
STUDENT = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262), start=2))


def reproduce(arms: Sequence[str], seeds: int, out: Path, processes: int) -> str:
    """Runs every arm with every seed, and returns the table in Markdown.

    Each (arm, seed) is a run under `out` and is kept: another call continues the runs, which several
    processes of one thread each make. Writes results.json there.
    """
    results = run_all(run, arms, seeds, out, processes)
    rows = {arm: summarise(of_seeds) for arm, of_seeds in results.items()}
    write_json(out / "results.json", rows)
    return as_table(rows)


def run_all(
    make: Callable[[str, int, Path], Any],
    arms: Sequence[str],
    seeds: int,
    out: Path,
    processes: int,
) -> dict[str, list]:
    """Returns what `make`(arm, seed, out) gives for every arm, seed by seed."""
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(make, *zip(*jobs, strict=True), repeat(out))
        results = dict(zip(jobs, tqdm(found, total=len(jobs), desc="runs"), strict=True))
    return {arm: [results[arm, seed] for seed in range(seeds)] for arm in arms}


def run(arm: str, seed: int, out: Path) -> dict:
    """Trains one arm with one seed and compares it with the base, or reads an earlier result."""
    folder = run_dir(out, arm, seed)
    result = folder / "result.json"
    if not result.exists():
        train(arm_config(arm, seed, folder))
        verdict = compare(bench().base, bench().score(folder))
        measures = {
            "quality": verdict.difference.mean,
            "win_rate": verdict.win_rate.mean,
            "faithful": verdict.faithfulness.mean,
            "updates": json.loads((folder / METRICS).read_text().splitlines()[-1])["step"],
        }
        write_json(result, measures)
    return json.loads(result.read_text())


def run_dir(out: Path, arm: str, seed: int) -> Path:
    """Returns the directory of a run."""
    return out / arm.replace(" ", "_").replace("=", "") / f"seed_{seed}"


def arm_config(arm: str, seed: int, folder: Path) -> ConfigDict:
    """Returns config/tiny.py, or the arm's own config, with the changes of an arm."""
    config = load_config(CONFIGS.get(arm, "config/tiny.py"))
    changes = dict(ARMS[arm])
    if arm == FLIPPED:
        own = {name: config.preference[name] for name in ("checkpoint", "backbone")}
        changes["preference.kwargs"] = own | {"seed": seed}
    if arm == "official":
        files = ("config/sd15.py", "config/official/sd15.py")
        paper, official = (leaves(load_config(f)) for f in files)
        changes = {key: value for key, value in official.items() if value != paper[key]}
    changes |= {"seed": seed, "logdir": str(folder.parent), "run_name": folder.name}
    changes |= {"resume_from": "auto", "eval_interval": 0, "prompts.num": 64}
    config.update_from_flattened_dict(changes)
    return config


@cache
def bench() -> Bench:
    """Returns the base model with its images of the held-out captions, made once per process."""
    recipe = read_recipe(load_config("config/tiny.py"))
    prompts = read_prompts("assets/tiny/prompts/held_out.txt").prompts
    return Bench(recipe, prompts)


def summarise(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns each measure's mean over seeds, and half the width of its 95 % interval (Student's t)."""
    seeds, summary = len(results), {}
    for name in results[0]:
        values = [result[name] for result in results]
        error = statistics.stdev(values) / math.sqrt(seeds)
        summary |= {name: statistics.mean(values), f"{name}_interval": STUDENT[seeds] * error}
    return {"seeds": seeds} | summary


def as_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the results as a Markdown table."""
    head = ["arm", "quality against base", "win rate, %", "faithfulness against base, points"]
    cells = [
        [
            arm,
            f"{row['quality']:+.2f} ± {row['quality_interval']:.2f}",
            f"{100 * row['win_rate']:.1f} ± {100 * row['win_rate_interval']:.1f}",
            f"{100 * row['faithful']:+.1f} ± {100 * row['faithful_interval']:.1f}",
            f"{row['updates']:.0f}",
        ]
        for arm, row in rows.items()
    ]
    return markdown_table([*head, "updates"], cells)
