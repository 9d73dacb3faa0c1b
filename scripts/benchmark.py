"""What one iteration costs: measured on this machine, or counted without weights at full size.

    python scripts/benchmark.py --config=config/tiny.py --json=benchmark.json
    python scripts/benchmark.py --config=config/sdxl.py --meta --tflops=100 --num_gpus=4

The first times a rollout and the training on its pairs, through the functions that training calls. The
second runs the same code on shapes alone: FLOPs, memory, what fits on a card, hours of a whole run.
docs/performance.md explains the figures.
"""

import json
import sys
from pathlib import Path

from absl import app, flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spo.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config("config/sd15.py")
REPEATS = flags.DEFINE_integer("repeats", 5, "measured iterations, after one that warms up")
JSON = flags.DEFINE_string("json", "", "file for the figures")
META = flags.DEFINE_boolean("meta", False, "count on shapes alone, without weights")
TFLOPS = flags.DEFINE_float("tflops", 100.0, "--meta: TFLOP/s that a GPU reaches")
NUM_GPUS = flags.DEFINE_integer("num_gpus", 4, "--meta: GPUs of the run")
PAIR_SHARE = flags.DEFINE_float(
    "pair_share", 0.8, "--meta: share of the comparisons that are pairs"
)
CARDS = (24, 40, 48, 80)  # GiB


def main(_) -> None:
    with exit_on_user_error():
        check_flags()
        figures = estimate(CONFIG.value) if META.value else measure(CONFIG.value)
        if JSON.value:
            from spo.durable import write_file

            write_file(Path(JSON.value), (json.dumps(figures, indent=2) + "\n").encode())


def check_flags() -> None:
    """Raise UserError for a flag that makes no sense."""
    from spo.errors import UserError

    for flag in (REPEATS, NUM_GPUS, TFLOPS):
        if not flag.value > 0:
            raise UserError(f"--{flag.name}: {flag.value} must be above 0.")
    if not 0 <= PAIR_SHARE.value <= 1:
        raise UserError(f"--pair_share: {PAIR_SHARE.value} must be from 0 to 1.")
    if JSON.value and not Path(JSON.value).absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {Path(JSON.value).parent}; make it first.")


def measure(config) -> dict:
    """Time iterations on this machine, print the table, and return its figures."""
    from accelerate import PartialState

    from spo import timing
    from spo.batching import plan_batches
    from spo.metrics import peak_memory_gib

    device, plan = PartialState().device, plan_batches(config, 1)
    models = timing.load_models(config, plan.accumulation_steps, device)
    peak = timing.measure_peak(device, models.backbone.dtype)
    parts = timing.measure_parts(models, plan, REPEATS.value)
    figures = {
        name: {
            "seconds": part.median,
            "fastest": min(part.seconds),
            "slowest": max(part.seconds),
            "tflop": part.flops / 1e12,
            "share_of_peak": part.share_of(peak),
        }
        for name, part in parts.items()
    }
    print(
        f"{device}, {REPEATS.value} repeats; a rollout of {plan.slice_size} prompts, all pairs kept"
    )
    rows = [[name, *(f"{value:.4g}" for value in row.values())] for name, row in figures.items()]
    print_table(["", "seconds", "fastest", "slowest", "TFLOP", "share of peak"], rows)
    memory = peak_memory_gib(device)
    print(f"peak: {peak.flops / 1e12:.4g} TFLOP/s, copy {peak.copied_bytes / 2**30:.4g} GiB/s")
    print(f"peak memory: {memory:.4g} GiB")
    return {
        "parts": figures,
        "peak_tflops": peak.flops / 1e12,
        "peak_copy_gib_per_s": peak.copied_bytes / 2**30,
        "peak_memory_gib": memory,
    }


def estimate(config) -> dict:
    """Count one iteration without weights, print the tables, and return their figures."""
    from spo.estimate import BATCH, count_costs, training_part

    costs = count_costs(config)
    teraflops = {name: flops / 1e12 for name, flops in costs.flops.items()}
    resident = {name: size / 2**30 for name, size in costs.resident_bytes.items()}
    peaks = {name: size / 2**30 for name, size in costs.peak_bytes.items()}
    fits = {
        card: {part: costs.largest_batch(part, card * 2**30) for part in peaks} for card in CARDS
    }
    prompts = config.num_epochs * (config.prompts.num or 1000)  # 0 takes all, and reads none here
    flops = costs.run_flops(prompts, PAIR_SHARE.value, training_part(config))
    hours = flops / (TFLOPS.value * 1e12 * NUM_GPUS.value) / 3600
    print_table(["of a prompt; training: of a pair", "TFLOP"], _rows(teraflops))
    print_table(["all the time", "GiB"], _rows({**resident, "sum": sum(resident.values())}))
    print_table(["besides, of a prompt, an image or a pair", "GiB"], _rows(peaks))
    print_table(
        ["largest that fits on a card of", *(f"{card} GiB" for card in CARDS)],
        [[BATCH[part], *(str(fits[card][part] or "none") for card in CARDS)] for part in peaks],
    )
    print(
        f"{hours:.3g} hours for {prompts} prompts over all epochs, on {NUM_GPUS.value} GPUs at "
        f"{TFLOPS.value:g} TFLOP/s each, if {PAIR_SHARE.value:.0%} of a prompt's {costs.pairs} pairs "
        "are sure enough to count"
    )
    return {
        "tflop": teraflops,
        "pairs_of_a_prompt": costs.pairs,
        "resident_gib": resident,
        "peak_gib": peaks,
        "largest_batch": fits,
        "prompts": prompts,
        "hours": hours,
    }


def _rows(figures: dict[str, float]) -> list[list[str]]:
    return [[name, f"{value:.4g}"] for name, value in figures.items()]


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table whose first column is on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))
    print()


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
