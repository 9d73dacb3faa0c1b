"""Measures the parts of an iteration, in seconds and FLOPs, on the calls that training makes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from spo.costs.load import Models
from spo.method.collect import Collected, collect_rollout
from spo.types import PreferencePairs

ROLLOUT, TRAINING = "rollout", "training"
DENOISING, DECODING, SCORING = "denoising", "decoding", "scoring"


def flop_counter() -> FlopCounterMode:
    """Returns torch's counter (a multiply-add is 2 FLOPs), taught the CPU's fused attention."""
    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {
        attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    # The counter's own module tracker has hooks that keep activations alive.
    counter.mod_tracker = contextlib.nullcontext()
    counter.mod_tracker.parents = ("Global",)
    return counter


class Meter:
    """The seconds of named parts, and their FLOPs if a `counter` is in use."""

    def __init__(self, device: torch.device, counter: FlopCounterMode | None = None) -> None:
        self.device, self.counter = device, counter
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts everything within the context as `name`; parts may lie within parts."""
        flops, started = self.total_flops(), self.now()
        yield
        self.seconds[name] += self.now() - started
        self.flops[name] += self.total_flops() - flops

    @contextlib.contextmanager
    def each_call(self, parts: Mapping[str, tuple[object, str]]) -> Iterator[None]:
        """Counts every call of an object's method as a part: {part: (object, method)}."""
        with contextlib.ExitStack() as stack:
            for name, (owner, method) in parts.items():
                measured = self.measured(getattr(owner, method), name)
                stack.enter_context(mock.patch.object(owner, method, measured))
            yield

    def measured(self, function: Callable, name: str) -> Callable:
        """Returns `function` with every call counted as the part `name`."""
        return self.part(name)(function)

    def now(self) -> float:
        """Returns the seconds on a clock, once the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def total_flops(self) -> int:
        """Returns the FLOPs so far."""
        return 0 if self.counter is None else self.counter.get_total_flops()


def draw_pairs(models: Models, prompts: Sequence[str], meter: Meter, apart: bool) -> Collected:
    """Rolls out `prompts` once; `apart` also measures denoising, decoding and scoring."""
    backbone, scorer = models.backbone, models.scorer
    parts = {
        DENOISING: (backbone, "predict"),
        DECODING: (backbone, "decode_candidates"),
        SCORING: (scorer, "score"),
    }
    inner = meter.each_call(parts) if apart else contextlib.nullcontext()
    with meter.part(ROLLOUT), inner, models.learner.drawing_network():
        return collect_rollout(
            backbone,
            scorer,
            models.learner.sampler,
            models.recipe.collect,
            prompts,
            torch.arange(len(prompts), device=backbone.device),
            torch.Generator().manual_seed(0),
        )


def train_on_pairs(models: Models, pairs: PreferencePairs, size: int, meter: Meter) -> None:
    """Trains on minibatches of `size` pairs."""
    with meter.part(TRAINING):
        for index, start in enumerate(range(0, len(pairs), size)):
            models.learner.train_minibatch(pairs.select(slice(start, start + size)), index)
