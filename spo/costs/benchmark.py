"""Prints the costs of an iteration as tables: timed in turns, or counted without weights."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from spo.costs.count import BATCH_KEYS, count_costs, training_part
from spo.costs.load import Models
from spo.costs.measure import Measured, Work, count_work, measure_peak, time_parts
from spo.costs.meter import ROLLOUT
from spo.method.metrics import peak_memory_gib
from spo.run.tables import markdown_table

PAIR_SHARE = 0.8  # of the comparisons that pass the threshold: assumed
CARDS = (24, 40, 48, 80)  # GiB


def time_in_turns(
    loaders: Mapping[str, Callable[[], Models]], rounds: int, repeats: int
) -> dict[str, Measured]:
    """Measures the models of every loader in turn, `rounds` times.

    In a turn the models load, warm up, and are measured, with no others in memory. Taking turns lets
    load on the machine affect all alike.
    """
    work: dict[str, Work] = {}
    peaks: dict[torch.dtype, float] = {}
    turns, peak_of, memory = {n: [] for n in loaders}, {}, dict.fromkeys(loaders, 0.0)
    for _ in range(rounds):
        for name, load in loaders.items():
            models = load()
            device, dtype = models.backbone.device, models.backbone.dtype
            if dtype not in peaks:
                peaks[dtype] = measure_peak(device, dtype)
            if name not in work:
                work[name], peak_of[name] = count_work(models), peaks[dtype]
            turns[name].append(time_parts(models, repeats))
            memory[name] = max(memory[name], peak_memory_gib(device))
            del models
            _forget()
    return {n: Measured(work[n], peak_of[n], tuple(turns[n]), memory[n]) for n in loaders}


def _forget() -> None:
    """Frees the last models' memory, torch.compile's share included."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def print_times(
    loaders: Mapping[str, Callable[[], Models]], rounds: int, repeats: int
) -> dict[str, Any]:
    """Times each of `loaders` against the first, prints the tables, and returns the figures."""
    found = time_in_turns(loaders, rounds, repeats)
    baseline, *_ = found.values()
    print(f"rounds: {rounds}, repeats: {repeats}; every comparison makes a pair\n")
    figures = {}
    for name, measured in found.items():
        parts = {part: _figures(measured, part, baseline) for part in measured.turns[0]}
        peaks = {"peak_memory_gib": measured.peak_gib, "peak_tflops": measured.peak_flops / 1e12}
        rows = [[part, *map(_number, row.values())] for part, row in parts.items()]
        print(markdown_table([name, *parts[ROLLOUT]], rows))
        print(*(f"{key}: {_number(value)}" for key, value in peaks.items()), "", sep="\n")
        figures[name] = {"parts": parts} | peaks
    return figures


def _figures(measured: Measured, part: str, baseline: Measured) -> dict[str, float]:
    seconds, ratios = measured.seconds(part), measured.ratios(part, baseline)
    figures = {
        "seconds": median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "tflop": measured.work.flops[part] / 1e12,
        "share_of_peak": measured.work.flops[part] / measured.peak_flops / median(seconds),
    }
    if measured is baseline:
        return figures
    return figures | {"rate_of_baseline": median(ratios), "from": min(ratios), "to": max(ratios)}


def print_costs(models: Models, prompts: int, tflops: float, num_gpus: int) -> dict[str, Any]:
    """Counts an iteration of `models` on the meta device, prints the tables, returns the figures.

    The hours are those of `prompts` prompts on GPUs that reach `tflops` TFLOP/s each.
    """
    costs = count_costs(models)
    teraflops = {name: flops / 1e12 for name, flops in costs.flops.items()}
    resident = {name: size / 2**30 for name, size in costs.resident_bytes.items()}
    peaks = {name: size / 2**30 for name, size in costs.peak_bytes.items()}
    fits = {c: {part: costs.largest_batch(part, c * 2**30) for part in peaks} for c in CARDS}
    flops = costs.run_flops(prompts, prompts * costs.pairs * PAIR_SHARE, training_part(models))
    hours = flops / (tflops * 1e12 * num_gpus) / 3600
    if not costs.has_scorer:
        print("preference.scorer is not known: it costs nothing here\n")
    _print("of a prompt; training: of a pair", "TFLOP", teraflops)
    _print("all the time", "GiB", resident | {"sum": sum(resident.values())})
    _print("on top, of a prompt, an image or a pair", "GiB", peaks)
    rows = [
        [f"{key} ({part})", *(str(fits[c][part] or "none") for c in CARDS)]
        for part, key in BATCH_KEYS.items()
    ]
    print(markdown_table(["largest that fits on a card of", *(f"{c} GiB" for c in CARDS)], rows))
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
        "largest_batch": fits,
        "prompts": prompts,
        "hours": hours,
    }


def _print(title: str, unit: str, figures: Mapping[str, float]) -> None:
    print(markdown_table([title, unit], [[n, _number(value)] for n, value in figures.items()]))


def _number(value: float) -> str:
    return f"{value:.4g}"
