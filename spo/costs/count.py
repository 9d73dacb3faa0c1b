"""Counts the costs of a run without weights: FLOPs, memory, and the batches that fit on a card."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spo.costs.load import Models
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
from spo.costs.weightless_models import meta_kernels
from spo.models.optimizers import moment_bytes

CHECKPOINTED = "training, gradient checkpointing"
SCORER = "scorer"  # the preference model's name among the networks
BATCH_KEYS = {
    DENOISING: "sample.batch_size",
    DECODING: "sample.decode_batch_size",
    TRAINING: "train.batch_size",
    CHECKPOINTED: "train.batch_size",
}
# The share of a card's memory left for CUDA itself, kernels' workspaces and fragmentation: assumed.
SPARE = 0.1


@dataclass(frozen=True)
class Costs:
    """Costs per prompt of a rollout and per pair of training, by the parts of spo.costs.meter."""

    flops: Mapping[str, int]  # rollout and its parts: of a prompt; training: of a pair
    pairs: int  # of a prompt, if every comparison makes a pair
    resident_bytes: Mapping[str, int]  # in memory all the time, by network
    # Largest set of tensors alive at once on top of that; denoising: of a prompt, decoding: of an
    # image with its score, training: of a pair.
    peak_bytes: Mapping[str, int]

    @property
    def has_scorer(self) -> bool:
        """Returns whether the costs of the preference model are known."""
        return SCORER in self.resident_bytes

    def bytes_of(self, part: str, batch: int) -> int:
        """Returns the memory of `batch` prompts, images or pairs in `part`, networks included."""
        return sum(self.resident_bytes.values()) + batch * self.peak_bytes[part]

    def largest_batch(self, part: str, card_bytes: float) -> int:
        """Returns how many prompts, images or pairs of `part` fit at once, 0 for none."""
        free = card_bytes * (1 - SPARE) - self.bytes_of(part, 0)
        return max(0, int(free // self.peak_bytes[part]))


def training_part(models: Models) -> str:
    """Returns the part of the costs that the config's own training is."""
    return CHECKPOINTED if models.recipe.run.gradient_checkpointing else TRAINING


def count_costs(models: Models, trainings: Sequence[str] = (TRAINING, CHECKPOINTED)) -> Costs:
    """Runs `models` on the meta device: a prompt's rollout, then each kind of training of a pair."""
    device = models.backbone.device
    with meta_kernels(), flop_counter() as counter, LiveMemory(device) as memory:
        meters = {name: MetaMeter(device, counter, memory) for name in (ROLLOUT, *trainings)}
        meter = meters.pop(ROLLOUT)
        pairs = draw_pairs(models, ["a prompt"], meter, apart=True).pairs
        for name, own in meters.items():
            unet = models.backbone.unet
            unet.disable_gradient_checkpointing()
            if name == CHECKPOINTED:
                unet.enable_gradient_checkpointing()
            # Recomputation in the backward pass also runs under autocast, as in training.
            with models.backbone.autocast():
                train_on_pairs(models, pairs.select(slice(1)), 1, own)
    peaks = meter.peak_bytes
    return Costs(
        flops={name: meter.flops[name] for name in (ROLLOUT, DENOISING, DECODING, SCORING)}
        | {name: own.flops[TRAINING] for name, own in meters.items()},
        pairs=len(pairs),
        resident_bytes=_resident(models),
        peak_bytes={DENOISING: peaks[DENOISING], DECODING: max(peaks[DECODING], peaks[SCORING])}
        | {name: own.peak_bytes[TRAINING] for name, own in meters.items()},
    )


def _resident(models: Models) -> dict[str, int]:
    learner, lora = models.learner, models.learner.lora.parameters
    own = {id(parameter) for parameter in lora.values()}
    networks = models.backbone.networks()
    for part in vars(models.scorer).values():
        if isinstance(part, nn.Module):
            networks[SCORER] = part
    sizes = {
        name: _bytes(p for p in module.parameters() if id(p) not in own)
        for name, module in networks.items()
    }
    if learner.merged is not None:
        layers = learner.lora.layers.values()
        sizes["weights with the LoRA merged in"] = _bytes(layer.weight for layer in layers)
    # The policy, its gradient, and the other LoRAs.
    copies = 2 + (learner.ema is not None) + (learner.reference is not None)
    trained = copies * _bytes(lora.values()) + moment_bytes(
        models.recipe.optimizer.optimizer, lora.values()
    )
    return sizes | {"LoRAs, gradient, optimizer": trained}


class LiveMemory(TorchDispatchMode):
    """Follows the tensors made on a device within the context, and the bytes alive at once.

    Tensors from before, such as weights, do not count, nor does what a kernel allocates inside.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self._add(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._add(tensor, is_new=True)
        return result

    def _add(self, tensor: Any, is_new: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
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
    """A meter for the meta device that also follows memory, and runs calls of equal shapes once.

    FLOPs and memory follow from shapes: of the 20 calls of the UNet in a rollout two are different.
    """

    def __init__(self, device: torch.device, counter: FlopCounterMode, memory: LiveMemory) -> None:
        super().__init__(device, counter)
        self.memory, self._repeated = memory, 0
        self.peak_bytes: dict[str, int] = defaultdict(int)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts as Meter does; a part's memory is the peak on top of what lived at its start."""
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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
