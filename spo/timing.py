"""How long an iteration takes on this machine, part by part, beside what the device can do."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict

from spo import backbone, scorers, settings
from spo.backbone import Backbone
from spo.batching import BatchPlan
from spo.costs import (
    EMA,
    Meter,
    Models,
    draw_pairs,
    flop_counter,
    train_on_pairs,
    with_every_pair,
)


@dataclass(frozen=True)
class DevicePeak:
    """What the device reaches at most, per second."""

    flops: float  # of a square matrix product in the UNet's dtype
    copied_bytes: float  # read and written by a copy


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
    """The best of ten products and ten copies."""
    meter, side = Meter(device), 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device).to(dtype)
    buffer = torch.ones(side * side * 4, dtype=torch.float32, device=device)
    target = torch.empty_like(buffer)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(10):
            started = meter.now()
            work()
            seconds.append(meter.now() - started)
        return min(seconds)

    copied = 2 * buffer.numel() * buffer.element_size()
    return DevicePeak(
        flops=2 * side**3 / best(lambda: matrix @ matrix),
        copied_bytes=copied / best(lambda: target.copy_(buffer)),
    )


def measure_parts(models: Models, plan: BatchPlan, repeats: int) -> dict[str, Part]:
    """Iterations over one slice of prompts: one warms up and is counted, `repeats` are timed.

    Rollout and training are timed as they are; what lies within a rollout, in a further one, because
    waiting for the GPU around each part costs time.
    """
    device, prompts = models.backbone.device, ["a prompt"] * plan.slice_size
    with flop_counter() as counter:
        counted = Meter(device, counter)
        train_on_pairs(
            models, draw_pairs(models, prompts, counted, apart=True), plan.minibatch_size, counted
        )
    seconds: dict[str, list[float]] = {name: [] for name in counted.seconds}
    for _ in range(repeats):
        apart, whole = Meter(device), Meter(device)
        draw_pairs(models, prompts, apart, apart=True)
        pairs = draw_pairs(models, prompts, whole, apart=False)
        train_on_pairs(models, pairs, plan.minibatch_size, whole)
        for name, value in (apart.seconds | whole.seconds).items():
            seconds[name].append(value)
    lora = models.learner.lora.parameters.values()
    moved = {EMA: 3 * sum(p.numel() * p.element_size() for p in lora)}  # two read, one written
    return {
        name: Part(tuple(values), counted.flops[name], moved.get(name, 0))
        for name, values in seconds.items()
    }


def load_models(config: ConfigDict, accumulation_steps: int, device: torch.device) -> Models:
    """The models of `config`, every comparison of which makes a pair.

    Raises UserError for what is wrong with the config or its files.
    """
    settings.check(config)
    backbone.check_source(settings.rollout_source(config), config.family)
    scorers.check_source(settings.scorer_source(config))
    base = Backbone(settings.rollout_source(config), config.family, config.mixed_precision, device)
    if config.train.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    lora = settings.build_lora(config, base.unet, seed=0)
    return Models(
        base,
        scorers.load_scorer(settings.scorer_source(config), device),
        settings.build_learner(config, base, base.unet, lora, accumulation_steps),
        with_every_pair(settings.collect_settings(config)),
    )
