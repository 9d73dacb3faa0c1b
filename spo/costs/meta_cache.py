"""Operations on the meta device by what is known of them: their results follow from shapes alone."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class _Result:
    """What an operation gave, and its FLOPs."""

    shapes: tuple[tuple[torch.Size, Sequence[int], torch.dtype] | None, ...]  # sizes and strides
    kind: type  # Tensor, or tuple or list of them
    flops: int

    def again(self) -> Any:
        """Tensors like those that it gave."""
        with torch._C._DisableTorchDispatch():
            made = [
                shape and torch.empty_strided(*shape[:2], dtype=shape[2], device="meta")
                for shape in self.shapes
            ]
        return made[0] if self.kind is Tensor else self.kind(made)


class KnownShapes(TorchDispatchMode):
    """Within the context an operation on shapes that it had before is not worked out anew.

    Most operations on the meta device are worked out in Python, and a network is the same layers over
    and over. To be entered after `counter`, which is told of what did not reach it.
    """

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self._known: dict[Hashable, _Result | None] = {}  # None: has to be worked out each time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not _makes_its_results(func):
            if func._overloadpacket in self._counter.flop_registry:
                return func(*args, **kwargs)
            with torch._C._DisableTorchDispatch():  # nothing to count
                return func(*args, **kwargs)
        key = func, _key(args), _key(tuple(kwargs.items()))
        known = self._known.get(key)
        if known is not None:
            if known.flops:
                self._counter.flop_counts["Global"][func._overloadpacket] += known.flops
            return known.again()
        before = self._counter.get_total_flops()
        out = func(*args, **kwargs)
        if key not in self._known:
            flops = self._counter.get_total_flops() - before
            self._known[key] = _result((args, kwargs), out, flops)
        return out


@functools.cache
def _makes_its_results(func: torch._ops.OpOverload) -> bool:
    """Whether `func` says that it neither changes its arguments nor gives views of them."""
    schema = func._schema
    return all(part.alias_info is None for part in (*schema.arguments, *schema.returns))


def _key(value: Any) -> Hashable:
    """What decides the shapes of results: equal for equal arguments."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    return type(value), value


def _result(arguments: Any, out: Any, flops: int) -> _Result | None:
    """What to know of an operation; None where its result is a view, or follows from numbers."""
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    several = isinstance(out, tuple | list)
    made = list(out) if several else [out]
    tensors = [part for part in made if part is not None]
    if not given or not all(isinstance(t, Tensor) and t.is_meta for t in (*given, *tensors)):
        return None
    storages = [{t.untyped_storage()._cdata for t in group} for group in (given, tensors)]
    if storages[0] & storages[1]:
        return None
    shapes = tuple(t if t is None else (t.shape, t.stride(), t.dtype) for t in made)
    return _Result(shapes, type(out) if several else Tensor, flops)
