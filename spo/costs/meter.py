"""What an iteration costs: seconds, FLOPs and memory of its parts, on the calls that training makes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from spo.method.collect import Collected, CollectSettings, collect_rollout
from spo.method.ema import update_ema
from spo.method.learner import Learner
from spo.models.backbone import Backbone
from spo.scorers import Scorer
from spo.types import PreferencePairs

ROLLOUT, TRAINING, EMA = "rollout", "training", "EMA update"
DENOISING, DECODING, SCORING = "denoising", "decoding", "scoring"


@dataclass(frozen=True)
class Models:
    """What an iteration runs on."""

    backbone: Backbone
    scorer: Scorer
    learner: Learner
    collect: CollectSettings


def with_every_pair(collect: CollectSettings) -> CollectSettings:
    """`collect` with a threshold that every comparison passes: the work is the same for all models."""
    return replace(collect, pairs=replace(collect.pairs, threshold=-1.0))


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_, **__
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def flop_counter() -> FlopCounterMode:
    """torch's counter (a multiply-add is 2 FLOPs), which does not know the CPU's fused attention."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules:
    """In the place of the counter's tracker of modules, whose hooks keep activations alive."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


@contextlib.contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """Within the context `owner` has `value` for its attribute `name`."""
    is_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if is_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)  # uncovers the class's


class Meter:
    """The seconds of named parts, and their FLOPs where there is a `counter` in use."""

    def __init__(self, device: torch.device, counter: FlopCounterMode | None = None) -> None:
        self.device, self.counter = device, counter
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within the context everything counts as `name`; parts may lie within parts."""
        flops, started = self.total_flops(), self.now()
        yield
        self.seconds[name] += self.now() - started
        self.flops[name] += self.total_flops() - flops

    @contextlib.contextmanager
    def each_call(self, parts: Mapping[str, tuple[object, str]]) -> Iterator[None]:
        """Within the context every call of an object's method is a part: {part: (object, method)}."""
        with contextlib.ExitStack() as stack:
            for name, (owner, method) in parts.items():
                measured = self.measured(getattr(owner, method), name)
                stack.enter_context(replaced(owner, method, measured))
            yield

    def measured(self, function: Callable, name: str) -> Callable:
        """`function`, every call of which is a part."""

        def call(*args: Any) -> Any:
            with self.part(name):
                return function(*args)

        return call

    def now(self) -> float:
        """Seconds on a clock, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def total_flops(self) -> int:
        """FLOPs so far."""
        return 0 if self.counter is None else self.counter.get_total_flops()


def draw_pairs(models: Models, prompts: Sequence[str], meter: Meter, apart: bool) -> Collected:
    """One rollout of `prompts`; `apart`: its denoising, decoding and scoring are measured, too."""
    backbone, scorer = models.backbone, models.scorer
    parts = {
        DENOISING: (backbone, "predict"),
        DECODING: (backbone, "decode_candidates"),
        SCORING: (scorer, "score"),
    }
    inner = meter.each_call(parts) if apart else contextlib.nullcontext()
    with meter.part(ROLLOUT), inner, models.learner.sampler():
        return collect_rollout(
            backbone,
            scorer,
            models.learner.schedule,
            models.collect,
            prompts,
            torch.arange(len(prompts), device=backbone.device),
            torch.Generator().manual_seed(0),
        )


def train_on_pairs(models: Models, pairs: PreferencePairs, size: int, meter: Meter) -> None:
    """Train on minibatches of `size` pairs, then measure an EMA update once more, by itself."""
    learner = models.learner
    with meter.part(TRAINING):
        for index, start in enumerate(range(0, len(pairs), size)):
            learner.train_minibatch(pairs.select(slice(start, start + size)), index)
    if learner.ema is not None:
        with meter.part(EMA):
            update_ema(learner.ema, learner.lora.parameters, learner.settings.ema_decay)
