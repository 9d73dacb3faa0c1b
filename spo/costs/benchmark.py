"""Prints the costs of an iteration as tables: timed in turns, or counted without weights."""

import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest import mock

import torch

from spo.costs.count import BATCH_KEYS, CHECKPOINTED, SCORER, Costs, count_costs
from spo.costs.evaluation import count_evaluation
from spo.costs.load import Models
from spo.costs.meter import ROLLOUT, TRAINING, Meter, draw_pairs, flop_counter, train_on_pairs
from spo.errors import UserError
from spo.method.metrics import peak_memory_gib
from spo.run.tables import markdown_table

ITERATION = "rollout and training"
PAIR_SHARE = 0.8  # of the comparisons that pass the threshold: assumed
CARDS = (24, 40, 48, 80)  # GiB
Loaders = Mapping[str, Callable[[], Models]]


@dataclass(frozen=True)
class Work:
    """The work of one iteration over one slice of prompts; the same each time."""

    flops: Mapping[str, int]  # of each part
    prompts: int
    pairs: int


@dataclass
class Measured:
    """The measured iterations of one config, round by round."""

    work: Work
    turns: list[dict[str, list[float]]] = field(default_factory=list)  # seconds of part's repeats
    peak_gib: float = 0.0  # of memory, the most of all rounds

    def seconds(self, part: str) -> list[float]:
        """Returns the seconds of a part: all repeats of all rounds."""
        return [seconds for turn in self.turns for seconds in turn[part]]

    def ratios(self, part: str, baseline: "Measured") -> list[float]:
        """Returns the rate of this config as a multiple of the baseline's, round by round.

        Rates are pairs per second: a config may do more of them at once, or of a prompt.
        """
        work = self.work.pairs / baseline.work.pairs
        turns = zip(baseline.turns, self.turns, strict=True)
        return [work * median(then[part]) / median(now[part]) for then, now in turns]


def run_iteration(models: Models, meter: Meter, apart: bool = False) -> Work:
    """Runs one iteration over one slice of prompts; `apart` also measures the parts of its rollout.

    Raises UserError if no score is finite: then there is nothing to train on.
    """
    prompts = models.plan.slice_size
    with meter.part(ITERATION):
        pairs = draw_pairs(models, prompts, meter, apart)
        if not len(pairs):
            raise UserError("no score is finite; try --config.mixed_precision=bf16.")
        train_on_pairs(models, pairs, models.plan.minibatch_size, meter)
    return Work(meter.flops, prompts, len(pairs))


def count_work(models: Models) -> Work:
    """Returns the work of an iteration, counted on the calls themselves without compilation."""
    as_written = torch.compiler.set_stance("force_eager")
    recorded = mock.patch.object(models.learner.minibatch_unet, "record", False)
    with as_written, recorded, flop_counter() as counter:
        return run_iteration(models, Meter(models.backbone.device, counter), apart=True)


def time_parts(models: Models, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each part in `repeats` iterations, after one that warms up.

    Rollout and training are timed as they run. The parts of a rollout are timed in a further one,
    because waiting for the GPU around each part costs time. Resets a GPU's peak memory after the
    warm-up.
    """
    device = models.backbone.device
    run_iteration(models, Meter(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        apart, whole = Meter(device), Meter(device)
        draw_pairs(models, models.plan.slice_size, apart, apart=True)
        run_iteration(models, whole)
        for name, value in (apart.seconds | whole.seconds).items():
            seconds[name].append(value)
    return seconds


def time_in_turns(loaders: Loaders, rounds: int, repeats: int) -> dict[str, Measured]:
    """Measures the models of every loader in turn, `rounds` times.

    In a turn the models load, warm up, and are measured, with no others in memory. Taking turns lets
    load on the machine affect all alike.
    """
    found: dict[str, Measured] = {}
    for _ in range(rounds):
        for name, load in loaders.items():
            models = load()
            if name not in found:
                found[name] = Measured(count_work(models))
            measured = found[name]
            measured.turns.append(time_parts(models, repeats))
            measured.peak_gib = max(measured.peak_gib, peak_memory_gib(models.backbone.device))
            del models
            torch.compiler.reset()  # holds memory, too
            gc.collect()
            torch.cuda.empty_cache()
    return found


def print_times(loaders: Loaders, rounds: int, repeats: int) -> dict[str, Any]:
    """Times each of `loaders` against the first, prints the tables, and returns the figures."""
    found = time_in_turns(loaders, rounds, repeats)
    baseline, *_ = found.values()
    print(f"rounds: {rounds}, repeats: {repeats}; every comparison makes a pair\n")
    figures = {}
    for name, measured in found.items():
        parts = {part: _figures(measured, part, baseline) for part in measured.turns[0]}
        _print_table([name, *parts[ROLLOUT]], {k: row.values() for k, row in parts.items()})
        print(f"peak_memory_gib: {measured.peak_gib:.4g}\n")
        figures[name] = {"parts": parts, "peak_memory_gib": measured.peak_gib}
    return figures


def _figures(measured: Measured, part: str, baseline: Measured) -> dict[str, float]:
    seconds, teraflops = measured.seconds(part), measured.work.flops[part] / 1e12
    figures = {"seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    figures |= {"tflop": teraflops, "tflop_per_second": teraflops / median(seconds)}
    if measured is not baseline:
        ratios = measured.ratios(part, baseline)
        figures |= {"rate_of_baseline": median(ratios), "from": min(ratios), "to": max(ratios)}
    return figures


def print_costs(models: Models, prompts: int, tflops: float, num_gpus: int) -> dict[str, Any]:
    """Counts an iteration of `models` on the meta device, prints the tables, returns the figures.

    The hours are those of `prompts` prompts on GPUs that reach `tflops` TFLOP/s each.
    """
    costs = count_costs(models)
    teraflops = {name: flops / 1e12 for name, flops in costs.flops.items()}
    resident = {name: size / 2**30 for name, size in costs.resident_bytes.items()}
    peaks = {name: size / 2**30 for name, size in costs.peak_bytes.items()}
    fits = {c: {part: costs.largest_batch(part, c * 2**30) for part in peaks} for c in CARDS}
    training = CHECKPOINTED if models.recipe.run.gradient_checkpointing else TRAINING
    pair = teraflops[training] * costs.pairs * PAIR_SHARE
    hours = prompts * (teraflops[ROLLOUT] + pair) / tflops / num_gpus / 3600
    if SCORER not in costs.resident_bytes:
        print("preference.scorer is not known: it costs nothing here\n")
    for title, unit, figures in (
        ("of a prompt; training: of a pair", "TFLOP", teraflops),
        ("all the time", "GiB", resident | {"sum": sum(resident.values())}),
        ("on top, of a prompt, an image or latent, or a pair", "GiB", peaks),
    ):
        _print_table([title, unit], {name: [value] for name, value in figures.items()})
    keys = [(part, BATCH_KEYS[part]) for part in peaks]
    rows = {f"{key} ({part})": [fits[c][part] for c in CARDS] for part, key in keys}
    _print_table(["largest that fits on a card of", *(f"{c} GiB" for c in CARDS)], rows)
    evaluation = _print_evaluation(models, costs, prompts * (teraflops[ROLLOUT] + pair))
    print(
        f"{hours:.3g} hours for {prompts} prompts over all epochs, on {num_gpus} GPUs at "
        f"{tflops:g} TFLOP/s each, if {PAIR_SHARE:.0%} of a prompt's {costs.pairs} pairs "
        "are sure enough to count"
    )
    return {
        "tflop": teraflops,
        "pairs_of_a_prompt": costs.pairs,
        "resident_gib": resident,
        "peak_gib": peaks,
        "hours": hours,
        "evaluation": evaluation,
    }


def _print_evaluation(models: Models, costs: Costs, run: float) -> dict[str, float]:
    """Counts the run's own evaluations beside the `run`'s TFLOP, and prints what share they take."""
    run_settings, settings = models.recipe.run, models.recipe.validation
    if not run_settings.eval_interval:
        return {}
    prompts = max(settings.num_judged, settings.num_images)
    found = count_evaluation(models, costs, prompts)
    times = run_settings.num_epochs // run_settings.eval_interval + 1
    figures = {name: getattr(found, name) / 1e12 for name in ("drawing", "judging")}
    shares = {name: f"{times * each / run:.2%}" for name, each in figures.items()}
    unknown = f" (without {', '.join(found.unknown)})" if found.unknown else ""
    print(
        f"an evaluation of {prompts} prompts: {figures['drawing']:.4g} TFLOP for its images, "
        f"{figures['judging']:.4g} for reward and judges{unknown}; {times} of them are "
        f"{shares['drawing']} and {shares['judging']} of the run"
    )
    return figures | {"times": times}


def _print_table(header: Sequence[str], rows: Mapping[str, Iterable[float]]) -> None:
    cells = [[name, *(f"{value:.4g}" for value in values)] for name, values in rows.items()]
    print(markdown_table(header, cells), end="\n\n")
