"""Counts what a run costs, without weights: FLOPs, memory, and the batches that fit on a card."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spo.costs.load import META, Models, meta_kernels
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
from spo.models.optimizers import moment_bytes

CHECKPOINTED = "training, gradient checkpointing"
SCORER = "scorer"  # the preference model's name among the networks
BATCH_KEYS = {
    DENOISING: "sample.batch_size",
    DECODING: "sample.decode_batch_size",
    SCORING: "sample.score_batch_size",
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
    # In memory all the time, by network; no SCORER if the preference model is not known.
    resident_bytes: Mapping[str, int]
    # Largest set of tensors alive at once on top of that; denoising: of a prompt, decoding: of an
    # image with its score, or scoring: of a latent, training: of a pair.
    peak_bytes: Mapping[str, int]

    def bytes_of(self, part: str, batch: int) -> int:
        """Returns the memory of a `batch` of what `part` takes, networks included."""
        return sum(self.resident_bytes.values()) + batch * self.peak_bytes[part]

    def largest_batch(self, part: str, card_bytes: float, beside: float = 0) -> int:
        """Returns how many of what `part` takes fit `beside` other bytes at once, 0 for none."""
        free = card_bytes * (1 - SPARE) - self.bytes_of(part, 0) - beside
        return max(0, int(free // self.peak_bytes[part]))


def count_costs(models: Models, trainings: Sequence[str] = (TRAINING, CHECKPOINTED)) -> Costs:
    """Runs `models` on the meta device: a prompt's rollout, then each kind of training of a pair."""
    unet = models.backbone.unet
    with meta_kernels(), flop_counter() as counter, LiveMemory() as memory:
        meter = MetaMeter(counter, memory)
        meters = {name: MetaMeter(counter, memory) for name in trainings}
        pairs = draw_pairs(models, 1, meter, apart=True)
        for name, own in meters.items():
            unet.disable_gradient_checkpointing()
            if name == CHECKPOINTED:
                unet.enable_gradient_checkpointing()
            # Recomputation in the backward pass also runs under autocast, as in training.
            with models.backbone.autocast():
                train_on_pairs(models, pairs.select(slice(1)), 1, own)
    decoding = [DECODING] if models.scorer.looks_at == "images" else []
    parts = [DENOISING, *decoding, SCORING]
    peaks = {name: meter.peak_bytes[name] for name in parts}
    if decoding:
        peaks[DECODING] = max(peaks[DECODING], peaks.pop(SCORING))
    return Costs(
        flops={name: meter.flops[name] for name in (ROLLOUT, *parts)}
        | {name: own.flops[TRAINING] for name, own in meters.items()},
        pairs=len(pairs),
        resident_bytes=_resident(models),
        peak_bytes=peaks | {name: own.peak_bytes[TRAINING] for name, own in meters.items()},
    )


def _resident(models: Models) -> dict[str, int]:
    learner, lora = models.learner, models.learner.lora.parameters
    own = {id(parameter) for parameter in lora.values()}
    networks = models.backbone.networks()
    for part in vars(models.scorer).values():
        if isinstance(part, nn.Module):
            networks[SCORER] = part
    sizes = {
        name: tensor_bytes(p for p in module.parameters() if id(p) not in own)
        for name, module in networks.items()
    }
    if learner.merged is not None:
        layers = learner.lora.layers.values()
        sizes["weights with the LoRA merged in"] = tensor_bytes(layer.weight for layer in layers)
    # The policy, its gradient, and the other LoRAs.
    copies = 2 + (learner.ema is not None) + (learner.reference is not None)
    moments = moment_bytes(models.recipe.optimizer.optimizer, lora.values())
    return sizes | {"LoRAs, gradient, optimizer": copies * tensor_bytes(lora.values()) + moments}


class LiveMemory(TorchDispatchMode):
    """Follows the tensors made on the meta device within the context, and the bytes alive at once.

    Tensors from before, such as weights, do not count, nor does what a kernel allocates inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            self._add(tensor, is_new=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._add(tensor, is_new=True)
        return result

    def _add(self, tensor: Any, is_new: bool) -> None:
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
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

    def __init__(self, counter: FlopCounterMode, memory: LiveMemory) -> None:
        super().__init__(META, counter)
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


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the memory of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
