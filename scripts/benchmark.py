"""What one iteration costs: measured on this machine, or counted without weights at full size.

    python scripts/benchmark.py --config=config/tiny.py --json=benchmark.json
    python scripts/benchmark.py --config=config/sd15.py --random --compare sample.decode_batch_size=16
    python scripts/benchmark.py --config=config/sdxl.py --meta --tflops=100 --num_gpus=4

The first times a rollout and the training on its pairs, through the functions that training calls. The
second times two configs in turn, with random weights in the place of published ones. The third runs
the same code on shapes alone: FLOPs, memory, what fits on a card, hours of a whole run.
docs/performance.md explains the figures.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from spo.command_line.flags import changed, define_config, exit_on_user_error, parse_flags

CONFIG = define_config("config/sd15.py")
REPEATS = flags.DEFINE_integer("repeats", 5, "measured iterations, after one that warms up")
COMPARE = flags.DEFINE_multi_string(
    "compare", [], "key=value[,key=value...]: a variant of the config; may be given several times"
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "--compare: turns of each variant")
RANDOM = flags.DEFINE_boolean("random", False, "random weights: nothing is downloaded")
PROFILE = flags.DEFINE_string("profile", "", "file for the operations that take longest")
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
        if META.value:
            figures = estimate(CONFIG.value)
        elif COMPARE.value:
            figures = compare(CONFIG.value)
        else:
            figures = measure(CONFIG.value)
        if JSON.value:
            from spo.atomic import write_file

            write_file(Path(JSON.value), (json.dumps(figures, indent=2) + "\n").encode())


def check_flags() -> None:
    """Raise UserError for a flag that makes no sense."""
    from spo.errors import UserError

    for flag in (REPEATS, ROUNDS, NUM_GPUS, TFLOPS):
        if not flag.value > 0:
            raise UserError(f"--{flag.name}: {flag.value} must be above 0.")
    if not 0 <= PAIR_SHARE.value <= 1:
        raise UserError(f"--pair_share: {PAIR_SHARE.value} must be from 0 to 1.")
    for flag in (JSON, PROFILE):
        folder = Path(flag.value).absolute().parent
        if flag.value and not folder.is_dir():
            raise UserError(f"--{flag.name}: there is no folder {folder}; make it first.")
    if META.value + bool(COMPARE.value) + bool(PROFILE.value) > 1:
        raise UserError("--meta, --compare, --profile: give one of them.")


def measure(config) -> dict:
    """Time iterations on this machine, print the table, and return its figures."""
    from spo.atomic import write_file
    from spo.costs import measure
    from spo.launch.batch_plan import plan_batches
    from spo.method.metrics import peak_memory_gib

    plan, models = plan_batches(config, 1), load(config)
    device = models.backbone.device
    peak = measure.measure_peak(device, models.backbone.dtype)
    work = measure.count_work(models, plan)
    parts = measure.parts_of(work, measure.time_parts(models, plan, REPEATS.value))
    figures = {name: part_figures(part, peak) for name, part in parts.items()}
    print(f"{device}, {REPEATS.value} repeats; a rollout of {work.prompts} prompts, all pairs kept")
    rows = [[name, *(f"{value:.4g}" for value in row.values())] for name, row in figures.items()]
    print_table(["", "seconds", "fastest", "slowest", "TFLOP", "share of peak"], rows)
    memory, speed = peak_memory_gib(device), images_per_second(work, parts)
    print_peak(peak)
    print(f"images per second of the rollout: {speed:.4g}")
    print(f"peak memory: {memory:.4g} GiB")
    if PROFILE.value:
        from spo.costs.profile import profile_iteration

        write_file(Path(PROFILE.value), profile_iteration(models, plan).encode())
    return {
        "parts": figures,
        "images_per_second": speed,
        **peak_figures(peak),
        "peak_memory_gib": memory,
    }


def load(config):
    """The models of `config` on this machine's device."""
    from accelerate import PartialState

    from spo.costs import measure
    from spo.launch.batch_plan import plan_batches

    steps = plan_batches(config, 1).accumulation_steps
    return measure.load_models(config, steps, PartialState().device, RANDOM.value)


def part_figures(part, peak) -> dict:
    return {
        "seconds": part.median,
        "fastest": min(part.seconds),
        "slowest": max(part.seconds),
        "tflop": part.flops / 1e12,
        "share_of_peak": part.share_of(peak),
    }


def images_per_second(work, parts) -> float:
    """Candidates scored per second of rollout, at the median."""
    from spo.costs.meter import ROLLOUT

    return work.images / parts[ROLLOUT].median


def peak_figures(peak) -> dict:
    return {
        "peak_tflops": peak.flops / 1e12,
        "peak_copy_gib_per_s": peak.copied_bytes / 2**30,
    }


def print_peak(peak) -> None:
    print(f"peak: {peak.flops / 1e12:.4g} TFLOP/s, copy {peak.copied_bytes / 2**30:.4g} GiB/s")


def compare(config) -> dict:
    """Time the config and its variants in turn, print the tables, and return their figures."""
    from accelerate import PartialState

    from spo.costs import measure
    from spo.costs.variants import BASELINE, compare
    from spo.models.backbone import DTYPES

    configs = {BASELINE: config} | {text: changed(config, text) for text in COMPARE.value}
    measured = compare(configs, load, ROUNDS.value, REPEATS.value)
    device = PartialState().device
    dtypes = {name: DTYPES[variant.mixed_precision] for name, variant in configs.items()}
    peaks = {dtype: measure.measure_peak(device, dtype) for dtype in set(dtypes.values())}
    figures = {}
    for name, variant in measured.items():
        peak = peaks[dtypes[name]]
        parts = variant.parts()
        memory = variant.peak_bytes and variant.peak_bytes / 2**30
        figures[name] = {
            "parts": {
                part: part_figures(found, peak)
                | {"ratios": variant.ratios(part, measured[BASELINE])}
                | {"turns": [turn.seconds[part] for turn in variant.turns]}
                for part, found in parts.items()
            },
            "images_per_second": images_per_second(variant.work, parts),
            **peak_figures(peak),
            "peak_memory_gib": memory or memory_apart(configs[name]),
        }
    print(f"{device}, {ROUNDS.value} rounds of {REPEATS.value} repeats, all pairs kept")
    print_comparison(figures)
    return {"variants": figures}


def memory_apart(config) -> float:
    """Peak memory in GiB of one iteration in a process of its own: on a CPU it is a process's."""
    from spo.command_line.config_files import save_config
    from spo.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        settings, figures = Path(folder, "config.json"), Path(folder, "figures.json")
        save_config(config, settings)
        arguments = [f"--config={settings}", f"--json={figures}", "--repeats=1"]
        arguments += ["--random"] if RANDOM.value else []
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--compare: peak memory was not measured: {done.stderr[-500:]}")
        return json.loads(figures.read_text())["peak_memory_gib"]


def print_comparison(variants: dict) -> None:
    """Part by part every variant beside the baseline, then what is true of the whole."""
    from statistics import median

    head = ["", "seconds", "rate of baseline", "from", "to", "TFLOP", "share of peak"]
    rows = []
    for part in next(iter(variants.values()))["parts"]:
        rows.append([part, *[""] * (len(head) - 1)])
        for name, variant in variants.items():
            row = variant["parts"][part]
            ratios = row["ratios"]
            values = [row["seconds"], median(ratios), min(ratios), max(ratios)]
            values += [row["tflop"], row["share_of_peak"]]
            rows.append([f"  {name}", *(f"{value:.4g}" for value in values)])
    print_table(head, rows)
    keys = ("images_per_second", "peak_memory_gib", "peak_tflops")
    rows = [[name, *(f"{v[key]:.4g}" for key in keys)] for name, v in variants.items()]
    print_table(["", "images per second", "peak memory, GiB", "peak TFLOP/s"], rows)


def estimate(config) -> dict:
    """Count one iteration without weights, print the tables, and return their figures."""
    from spo.costs.count import BATCH, count_costs, training_part

    costs = count_costs(config)
    teraflops = {name: flops / 1e12 for name, flops in costs.flops.items()}
    resident = {name: size / 2**30 for name, size in costs.resident_bytes.items()}
    peaks = {name: size / 2**30 for name, size in costs.peak_bytes.items()}
    fits = {
        card: {part: costs.largest_batch(part, card * 2**30) for part in peaks} for card in CARDS
    }
    prompts = config.num_epochs * (config.prompts.num or 1000)  # 0 takes all, and reads none here
    pairs = prompts * costs.pairs * PAIR_SHARE.value
    flops = costs.run_flops(prompts, pairs, training_part(config))
    hours = flops / (TFLOPS.value * 1e12 * NUM_GPUS.value) / 3600
    if not costs.has_scorer:
        print(f"preference.scorer={config.preference.scorer} is not known: it costs nothing here")
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
