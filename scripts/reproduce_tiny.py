"""The paper's claims in miniature: every arm of the table, several seeds each, on the tiny world.

    python scripts/reproduce_tiny.py --quick        # the main arms: 35 minutes on two cores
    python scripts/reproduce_tiny.py                # every arm

Each (arm, seed) is a run under `--out`, which is kept: the command given again goes on where it
stopped. Writes results.json, table.md and results.png there.
"""

import argparse
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FLIPPED = "preferences flipped at random"
# What each arm changes of config/tiny.py; arm_config fills in FLIPPED and "official".
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
# Student's t at 97.5 %, by the number of seeds: half the width of an interval in standard errors.
STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}
MEASURES = ("quality", "win_rate", "faithful", "updates")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce_tiny"))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these")
    parser.add_argument("--seeds", type=int, default=5, choices=STUDENT)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    arms = options.arms or (QUICK if options.quick else tuple(ARMS))
    jobs = [(arm, seed) for seed in range(options.seeds) for arm in arms]
    results = run_all(jobs, options.out, options.processes)
    rows = {arm: summarise([results[arm, seed] for seed in range(options.seeds)]) for arm in arms}
    (options.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    table = as_table(rows)
    (options.out / "table.md").write_text(table)
    plot(rows, options.out / "results.png")
    print(table)


def run_all(jobs, out: Path, processes: int) -> dict:
    """The result of each (arm, seed), in several processes of one thread each."""
    from tqdm import tqdm

    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    results = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(run, arm, seed, out): (arm, seed) for arm, seed in jobs}
        for done in tqdm(as_completed(waiting), total=len(jobs), desc="runs"):
            results[waiting[done]] = done.result()
    return results


def run(arm: str, seed: int, out: Path) -> dict:
    """Train and judge one arm with one seed, or read what was judged before."""
    folder = out / arm.replace(" ", "_").replace("=", "") / f"seed_{seed}"
    result = folder / "result.json"
    if not result.exists():
        from spo.method.trainer import train

        train(arm_config(arm, seed, folder))
        result.write_text(json.dumps(judge(folder)) + "\n")
    return json.loads(result.read_text())


def arm_config(arm: str, seed: int, folder: Path):
    """config/tiny.py with the changes of an arm."""
    from spo.command_line.config_files import leaves, load_config

    config = load_config("config/tiny.py")
    changes = dict(ARMS[arm])
    if arm == FLIPPED:
        preference = config.preference
        changes["preference.kwargs"] = {
            "checkpoint": preference.checkpoint,
            "backbone": preference.backbone,
            "seed": seed,
        }
    if arm == "official":
        paper, official = (leaves(load_config(f)) for f in ("config/sd15.py", OFFICIAL))
        changes = {key: value for key, value in official.items() if value != paper[key]}
    config.update_from_flattened_dict(
        changes
        | {
            "seed": seed,
            "logdir": str(folder.parent),
            "run_name": folder.name,
            "resume_from": "auto",
            "eval_interval": 0,
            "prompts.num": PROMPTS,
        }
    )
    return config


def judge(folder: Path) -> dict:
    """What the run's LoRA is worth against the base, on the held-out captions."""
    from spo.run.folder import METRICS
    from spo.tiny_world.evaluation import Verdict

    verdict = Verdict.of(bench().base, bench().score(folder))
    last = json.loads((folder / METRICS).read_text().splitlines()[-1])
    return {
        "quality": verdict.difference.mean,
        "win_rate": verdict.win_rate.mean,
        "faithful": verdict.faithfulness.mean,
        "updates": last["step"],
    }


@cache
def bench():
    """The base model and its images of the held-out captions, once in each process."""
    import torch

    from spo.command_line.config_files import load_config
    from spo.data.prompts import read_prompts
    from spo.method import build
    from spo.models.backbone import Backbone
    from spo.tiny_world.evaluation import Bench

    config = load_config("config/tiny.py")
    prompts = read_prompts("assets/tiny/prompts/held_out.txt").prompts
    backbone = Backbone(
        build.model_source(config), config.family, config.mixed_precision, torch.device("cpu")
    )
    lora = build.build_lora(config, backbone.unet, seed=0)
    return Bench(backbone, lora, prompts, build.image_settings(config))


def summarise(results: list[dict]) -> dict:
    """Mean over seeds of each measure, and half the width of its 95 % interval (Student's t)."""
    summary = {"seeds": len(results)}
    for name in MEASURES:
        values = [result[name] for result in results]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        summary[name] = mean
        summary[f"{name}_interval"] = STUDENT[len(values)] * math.sqrt(variance / len(values))
    return summary


def as_table(rows: dict[str, dict]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| arm | quality against base | win rate, % | faithfulness against base, points | updates |",
        "|---|---|---|---|---|",
    ]
    for arm, row in rows.items():
        lines.append(
            f"| {arm} | {row['quality']:+.2f} ± {row['quality_interval']:.2f} "
            f"| {100 * row['win_rate']:.1f} ± {100 * row['win_rate_interval']:.1f} "
            f"| {100 * row['faithful']:+.1f} ± {100 * row['faithful_interval']:.1f} "
            f"| {row['updates']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: dict[str, dict], file: Path) -> None:
    """Quality and faithfulness of every arm against the base, with intervals."""
    from matplotlib.figure import Figure

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


if __name__ == "__main__":
    main()
