"""What a run would cost, counted without weights: FLOPs, memory, what fits on a card, hours."""

from __future__ import annotations

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spo.costs.meta_cache import KnownShapes
from spo.costs.meter import (
    DECODING,
    DENOISING,
    ROLLOUT,
    SCORING,
    TRAINING,
    Meter,
    draw_pairs,
    flop_counter,
    train_on_pairs,
)
from spo.costs.weightless_models import SCORER, UnloadedModels, count_models, meta_kernels
from spo.models.optimizers import moment_bytes
from spo.types import PreferencePairs

CHECKPOINTED = "training, gradient checkpointing"
# What says how many are done at once.
BATCH = {
    DENOISING: "sample.batch_size",
    DECODING: "sample.decode_batch_size",
    TRAINING: "train.batch_size",
    CHECKPOINTED: "train.batch_size, gradient checkpointing",
}
# Of a card's memory, for CUDA itself, workspaces of kernels and fragmentation. An assumption.
SPARE = 0.1


@dataclass(frozen=True)
class Costs:
    """Per prompt of a rollout and per pair of training; keys are the parts of spo.costs.meter."""

    flops: Mapping[str, int]  # rollout and its parts: of a prompt; training: of a pair
    pairs: int  # that a prompt gives if every comparison is sure enough
    resident_bytes: Mapping[str, int]  # what is in memory all the time
    # Largest live set on top of that; denoising: of a prompt, decoding: of an image with its score,
    # training: of a pair.
    peak_bytes: Mapping[str, int]

    @property
    def has_scorer(self) -> bool:
        """Whether the preference model is one whose costs are known."""
        return SCORER in self.resident_bytes

    def run_flops(self, prompts: int, pairs: float, training: str) -> float:
        """FLOPs of a rollout of `prompts` prompts and the training on `pairs` pairs."""
        return prompts * self.flops[ROLLOUT] + pairs * self.flops[training]

    def bytes_of(self, part: str, batch: int) -> int:
        """Memory that `batch` prompts, images or pairs of a `part` need, with what is always there."""
        return sum(self.resident_bytes.values()) + batch * self.peak_bytes[part]

    def largest_batch(self, part: str, card_bytes: float) -> int:
        """Prompts, images or pairs of a `part` that fit at once; 0: none."""
        free = card_bytes * (1 - SPARE) - self.bytes_of(part, 0)
        return max(0, int(free // self.peak_bytes[part]))


def training_part(config: ConfigDict) -> str:
    """The part that training is under `config`."""
    return CHECKPOINTED if config.train.gradient_checkpointing else TRAINING


def count_costs(config: ConfigDict, trainings: Sequence[str] = (TRAINING, CHECKPOINTED)) -> Costs:
    """Run a rollout of one prompt and the training of one pair in these ways, on shapes alone.

    Leaves random state as it is. Raises UserError for what is wrong with `config`.
    """
    with torch.random.fork_rng(devices=[]):
        models = count_models(config)
        device = models.backbone.device
        with (
            meta_kernels(),
            flop_counter() as counter,
            KnownShapes(counter),
            LiveMemory(device) as memory,
        ):
            meters = {name: MetaMeter(device, counter, memory) for name in (ROLLOUT, *trainings)}
            meter = meters.pop(ROLLOUT)
            pairs = draw_pairs(models, ["a prompt"], meter, apart=True).pairs
            pair = pairs.select(slice(1))
            for name in trainings:
                _train(models, pair, meters[name], checkpointing=name == CHECKPOINTED)
    parts = (ROLLOUT, DENOISING, DECODING, SCORING)
    peaks = meter.peak_bytes
    return Costs(
        flops={name: meter.flops[name] for name in parts}
        | {name: own.flops[TRAINING] for name, own in meters.items()},
        pairs=len(pairs),
        resident_bytes=_resident(models, config.train.optimizer),
        peak_bytes={
            DENOISING: peaks[DENOISING],
            DECODING: max(peaks[DECODING], peaks[SCORING]),
        }
        | {name: own.peak_bytes[TRAINING] for name, own in meters.items()},
    )


def _train(
    models: UnloadedModels, pair: PreferencePairs, meter: MetaMeter, checkpointing: bool
) -> None:
    unet = models.backbone.unet
    (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
    # A backward pass that recomputes activations is to be under autocast, too, as in training.
    with models.backbone.autocast():
        train_on_pairs(models, pair, 1, meter)


def _resident(models: UnloadedModels, optimizer: str) -> dict[str, int]:
    learner, lora = models.learner, models.learner.lora.parameters
    own = {id(parameter) for parameter in lora.values()}
    sizes = {
        name: _bytes(p for p in module.parameters() if id(p) not in own)
        for name, module in models.networks.items()
    }
    if learner.merged is not None:
        layers = learner.lora.layers.values()
        sizes["weights with the LoRA merged in"] = _bytes(layer.weight for layer in layers)
    # Policy, gradient, and what besides is a LoRA.
    copies = 2 + (learner.ema is not None) + (learner.reference is not None)
    trained = copies * _bytes(lora.values()) + moment_bytes(optimizer, lora.values())
    return sizes | {"LoRAs, gradient, optimizer": trained}


class LiveMemory(TorchDispatchMode):
    """Follows the tensors that are made on a device within the context, and their bytes at once.

    What was there before, weights above all, does not count, nor does what a kernel needs inside.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor, is_new=True)
        return result

    def _add(self, tensor: Tensor, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type != self.device.type or id(storage) in self._known:
            return
        size = storage.nbytes() if is_new else 0
        self._known.add(id(storage))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, id(storage), size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class MetaMeter(Meter):
    """A meter for the meta device that knows memory, and runs calls of equal shapes only once.

    FLOPs and memory follow from shapes: of the 20 calls of the UNet in a rollout two are different.
    """

    def __init__(self, device: torch.device, counter: FlopCounterMode, memory: LiveMemory) -> None:
        super().__init__(device, counter)
        self.memory, self._repeated = memory, 0
        self.peak_bytes: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """As in Meter; its memory is the largest live set on top of what lived at its beginning."""
        outer, before = self.memory.peak, self.memory.live
        self.memory.peak = before
        with super().part(name):
            yield
        self.peak_bytes[name] = max(self.peak_bytes[name], self.memory.peak - before)
        self.memory.peak = max(outer, self.memory.peak)

    def total_flops(self) -> int:
        return super().total_flops() + self._repeated

    def measured(self, function: Callable, name: str) -> Callable:
        run, seen = super().measured(function, name), {}

        def call(*args: Any) -> Any:
            shape = next(a.shape for a in args if isinstance(a, Tensor))  # latents or images
            if shape in seen:
                result, flops = seen[shape]
                self.flops[name] += flops
                self._repeated += flops
                return result
            before = self.total_flops()
            result = run(*args)
            seen[shape] = result, self.total_flops() - before
            return result

        return call


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and dicts: torch's own function for that is slow."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
