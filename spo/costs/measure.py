"""Times the parts of an iteration on this machine, beside the rates that the device reaches."""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from spo.costs.load import Models
from spo.costs.meter import EMA, ROLLOUT, TRAINING, Meter, draw_pairs, flop_counter, train_on_pairs
from spo.errors import UserError

ITERATION = "rollout and training"


@dataclass(frozen=True)
class Work:
    """The work of one iteration over one slice of prompts; the same each time."""

    flops: Mapping[str, int]  # of each part
    prompts: int
    pairs: int

    def units(self, part: str) -> int:
        """Returns the pairs of training, 1 for the EMA update, and the prompts of any other part."""
        return {TRAINING: self.pairs, EMA: 1}.get(part, self.prompts)


@dataclass(frozen=True)
class Measured:
    """The measured iterations of one config, round by round."""

    work: Work
    peak_flops: float  # per second, that the device reaches in a matrix product
    turns: tuple[Mapping[str, tuple[float, ...]], ...]  # per round: seconds of each part's repeats
    peak_gib: float  # of memory, the most of all rounds

    def seconds(self, part: str) -> tuple[float, ...]:
        """Returns the seconds of a part, all repeats of all rounds."""
        return sum((turn[part] for turn in self.turns), ())

    def ratios(self, part: str, baseline: Measured) -> tuple[float, ...]:
        """Returns the rate of this config as a multiple of the baseline's, round by round.

        Rates are prompts, pairs or updates per second: a config may do more of them at once.
        """
        work = self.work.units(part) / baseline.work.units(part)
        return tuple(
            work * statistics.median(then[part]) / statistics.median(now[part])
            for then, now in zip(baseline.turns, self.turns, strict=True)
        )


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOPs per second of a square matrix product: the best of ten, or of 2 seconds."""
    meter, side, seconds = Meter(device), 8192 if device.type == "cuda" else 1024, []
    matrix = torch.randn(side, side, device=device).to(dtype)
    while len(seconds) < 10 and sum(seconds) < 2:
        started = meter.now()
        matrix @ matrix
        seconds.append(meter.now() - started)
    return 2 * side**3 / min(seconds)


def run_iteration(models: Models, meter: Meter, apart: bool = False) -> Work:
    """Runs one iteration over one slice of prompts; `apart` also measures the parts of its rollout.

    Raises UserError if no score is finite: then there is nothing to train on.
    """
    prompts = ["a prompt"] * models.plan.slice_size
    drawn = draw_pairs(models, prompts, meter, apart)
    if not len(drawn.pairs):
        raise UserError("no score is finite; try --config.mixed_precision=bf16.")
    train_on_pairs(models, drawn.pairs, models.plan.minibatch_size, meter)
    flops = meter.flops | {ITERATION: meter.flops[ROLLOUT] + meter.flops[TRAINING]}
    return Work(flops, prompts=len(prompts), pairs=len(drawn.pairs))


def count_work(models: Models) -> Work:
    """Returns the work of an iteration, counted on the calls themselves without compilation."""
    as_written = getattr(torch.compiler, "set_stance", lambda _: contextlib.nullcontext())
    with as_written("force_eager"), flop_counter() as counter:
        return run_iteration(models, Meter(models.backbone.device, counter), apart=True)


def time_parts(models: Models, repeats: int) -> dict[str, tuple[float, ...]]:
    """Returns the seconds of each part in `repeats` iterations, after one that warms up.

    Rollout and training are timed as they run. The parts of a rollout are timed in a further one,
    because waiting for the GPU around each part costs time. Resets a GPU's peak memory after the
    warm-up.
    """
    device, prompts = models.backbone.device, ["a prompt"] * models.plan.slice_size
    run_iteration(models, Meter(device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        apart, whole = Meter(device), Meter(device)
        draw_pairs(models, prompts, apart, apart=True)
        run_iteration(models, whole)
        for name, value in (apart.seconds | whole.seconds).items():
            seconds[name].append(value)
        seconds[ITERATION].append(whole.seconds[ROLLOUT] + whole.seconds[TRAINING])
    return {name: tuple(values) for name, values in seconds.items()}


def profile_iteration(models: Models) -> str:
    """Returns torch's table of the 30 operations that take longest in one warm iteration."""
    device, on_gpu = models.backbone.device, models.backbone.device.type == "cuda"
    run_iteration(models, Meter(device))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run_iteration(models, Meter(device))
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=30) + "\n"
