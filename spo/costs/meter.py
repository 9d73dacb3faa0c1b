"""Measures the parts of an iteration, in seconds and FLOPs, on the calls that training makes."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from spo.costs.load import Models
from spo.method.collect import collect_rollout
from spo.models.gpu import now
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
        flops, started = self.total_flops(), now(self.device)
        yield
        self.seconds[name] += now(self.device) - started
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
        return self.part(name)(function)

    def total_flops(self) -> int:
        return 0 if self.counter is None else self.counter.get_total_flops()


def draw_pairs(models: Models, prompts: int, meter: Meter, apart: bool) -> PreferencePairs:
    """Rolls out `prompts` prompts; `apart` also measures denoising, decoding and scoring."""
    backbone, scorer, learner = models.backbone, models.scorer, models.learner
    parts = {
        DENOISING: (backbone, "predict"),
        DECODING: (backbone, "decode_candidates"),
        SCORING: (scorer, "score"),
    }
    rows, noise = torch.arange(prompts, device=backbone.device), torch.Generator().manual_seed(0)
    inputs = models.recipe.collect, ["a prompt"] * prompts, rows, noise
    with meter.part(ROLLOUT), meter.each_call(parts if apart else {}), learner.drawing_network():
        return collect_rollout(backbone, scorer, learner.sampler, *inputs).pairs


def train_on_pairs(models: Models, pairs: PreferencePairs, size: int, meter: Meter) -> None:
    """Trains on minibatches of `size` pairs."""
    with meter.part(TRAINING):
        for index, start in enumerate(range(0, len(pairs), size)):
            models.learner.train_minibatch(pairs.select(slice(start, start + size)), index)
