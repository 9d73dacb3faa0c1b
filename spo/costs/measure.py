"""How long an iteration takes on this machine, part by part, beside what the device can do."""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict

from spo import scorers
from spo.costs import weightless_models
from spo.costs.meter import (
    EMA,
    ROLLOUT,
    TRAINING,
    Meter,
    Models,
    draw_pairs,
    flop_counter,
    train_on_pairs,
    with_every_pair,
)
from spo.errors import UserError
from spo.launch.batch_plan import BatchPlan
from spo.method import build
from spo.models import backbone
from spo.models.backbone import Backbone
from spo.models.device import set_up_device, speed_up

ITERATION = "rollout and training"


@dataclass(frozen=True)
class DevicePeak:
    """What the device reaches at most, per second."""

    flops: float  # of a square matrix product in the UNet's dtype
    copied_bytes: float  # read and written by a copy


@dataclass(frozen=True)
class Work:
    """What one iteration over one slice of prompts does; the same each time."""

    flops: Mapping[str, int]  # of each part
    copied_bytes: Mapping[str, int]  # of a part without products: what it reads and writes
    prompts: int
    pairs: int
    images: int  # candidates that are scored

    def units(self, part: str) -> int:
        """Pairs that training takes, one EMA update, and prompts of every other part."""
        return {TRAINING: self.pairs, EMA: 1}.get(part, self.prompts)


@dataclass(frozen=True)
class Part:
    """A part of an iteration over the measured repeats."""

    seconds: tuple[float, ...]
    flops: int  # of one repeat
    copied_bytes: int = 0  # what an EMA update, which has no products, reads and writes

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def share_of(self, peak: DevicePeak) -> float:
        """Share of the device's rate that the median reached: of its products, else of its copies."""
        least = max(self.flops / peak.flops, self.copied_bytes / peak.copied_bytes)
        return least / self.median


def measure_peak(device: torch.device, dtype: torch.dtype) -> DevicePeak:
    """The best of ten products and ten copies, or of what 2 seconds allow."""
    meter, side = Meter(device), 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)
    buffer = torch.ones(side * side * 4, dtype=torch.float32, device=device)
    target = torch.empty_like(buffer)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        while len(seconds) < 10 and sum(seconds) < 2:
            started = meter.now()
            work()
            seconds.append(meter.now() - started)
        return min(seconds)

    copied = 2 * buffer.numel() * buffer.element_size()
    return DevicePeak(
        flops=2 * side**3 / best(lambda: matrix @ matrix),
        copied_bytes=copied / best(lambda: target.copy_(buffer)),
    )


def run_iteration(models: Models, plan: BatchPlan, meter: Meter, apart: bool) -> Work:
    """One iteration over one slice of prompts; `apart`: parts of its rollout are measured, too.

    Raises UserError where no score is a number: then there is nothing to train on.
    """
    drawn = draw_pairs(models, ["a prompt"] * plan.slice_size, meter, apart)
    if not len(drawn.pairs):
        raise UserError("no score is finite; try --config.mixed_precision=bf16.")
    train_on_pairs(models, drawn.pairs, plan.minibatch_size, meter)
    flops = meter.flops | {ITERATION: meter.flops[ROLLOUT] + meter.flops[TRAINING]}
    lora = models.learner.lora.parameters.values()
    return Work(
        flops=flops,
        # Two read, one written.
        copied_bytes={EMA: 3 * sum(p.numel() * p.element_size() for p in lora)},
        prompts=plan.slice_size,
        pairs=len(drawn.pairs),
        images=sum(comparison.scores.numel() for comparison in drawn.comparisons),
    )


def count_work(models: Models, plan: BatchPlan) -> Work:
    """What an iteration does, counted on the calls themselves, nothing of which is compiled."""
    as_written = getattr(torch.compiler, "set_stance", lambda _: contextlib.nullcontext())
    with as_written("force_eager"), flop_counter() as counter:
        return run_iteration(models, plan, Meter(models.backbone.device, counter), apart=True)


def time_parts(models: Models, plan: BatchPlan, repeats: int) -> dict[str, tuple[float, ...]]:
    """Seconds of each part in `repeats` iterations over one slice, after one that warms up.

    Rollout and training are timed as they are; what lies within a rollout, in a further one, because
    waiting for the GPU around each part costs time. A GPU's peak memory starts anew with the repeats.
    """
    device, prompts = models.backbone.device, ["a prompt"] * plan.slice_size
    run_iteration(models, plan, Meter(device), apart=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats):
        apart, whole = Meter(device), Meter(device)
        draw_pairs(models, prompts, apart, apart=True)
        run_iteration(models, plan, whole, apart=False)
        for name, value in (apart.seconds | whole.seconds).items():
            seconds[name].append(value)
        seconds[ITERATION].append(whole.seconds[ROLLOUT] + whole.seconds[TRAINING])
    return {name: tuple(values) for name, values in seconds.items()}


def parts_of(work: Work, seconds: Mapping[str, tuple[float, ...]]) -> dict[str, Part]:
    """The parts of iterations that did this `work` in these `seconds`."""
    return {
        name: Part(values, work.flops[name], work.copied_bytes.get(name, 0))
        for name, values in seconds.items()
    }


def load_models(
    config: ConfigDict, accumulation_steps: int, device: torch.device, random: bool = False
) -> Models:
    """The models of `config`, every comparison of which makes a pair; `random`: without its weights.

    Raises UserError for what is wrong with the config or its files.
    """
    set_up_device(device, config.allow_tf32)
    if random:
        models = weightless_models.build_models(config, device, accumulation_steps)
    else:
        models = _load_models(config, accumulation_steps, device)
    if config.train.gradient_checkpointing:
        models.backbone.unet.enable_gradient_checkpointing()
    speed_up(models.backbone, models.scorer, build.speed_settings(config))
    return models


def _load_models(config: ConfigDict, accumulation_steps: int, device: torch.device) -> Models:
    build.check(config)
    backbone.check_source(build.rollout_source(config), config.family)
    scorers.check_scorer(build.scorer_source(config))
    base = Backbone(build.rollout_source(config), config.family, config.mixed_precision, device)
    lora = build.build_lora(config, base.unet, seed=0)
    return Models(
        base,
        scorers.load_scorer(build.scorer_source(config), device),
        build.build_learner(config, base, base.unet, lora, accumulation_steps),
        with_every_pair(build.collect_settings(config)),
    )
