"""A LoRA added into the UNet's weights, for passes without gradients: they cost what the base's cost.

The originals are kept, so the base model comes back bit for bit, which subtracting would not do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from spo.models.lora import Lora


class MergedLora:
    """W + alpha / rank B A of each weight W that a LoRA changes, made anew when the LoRA has changed.

    Takes as much memory as these weights do, in their dtype, from its first use on.
    """

    def __init__(self, lora: Lora) -> None:
        self._lora = lora
        self._merged: dict[str, Tensor] = {}
        self._made_of: list[tuple[Tensor, int]] = []

    @contextlib.contextmanager
    def using(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context the UNet runs with `weights` merged in, and cannot train them."""
        self._merge(weights)
        linears = {name: layer.base_layer for name, layer in self._lora.layers.items()}
        originals = {name: linear.weight.data for name, linear in linears.items()}
        with self._lora.using(None):
            try:
                for name, linear in linears.items():
                    linear.weight.data = self._merged[name]
                yield
            finally:
                for name, linear in linears.items():
                    linear.weight.data = originals[name]

    @torch.no_grad()
    def _merge(self, weights: Mapping[str, Tensor]) -> None:
        versions = [(tensor, tensor._version) for tensor in weights.values()]  # in-place changes
        if _same(versions, self._made_of):
            return
        for name, layer in self._lora.layers.items():
            base = layer.base_layer.weight
            down, up = (weights[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
            # In fp32, then rounded once.
            merged = torch.addmm(base.float(), up, down, alpha=self._lora.alpha / self._lora.rank)
            if name in self._merged:
                self._merged[name].copy_(merged)
            else:
                self._merged[name] = merged.to(base.dtype)
        self._made_of = versions


def _same(a: list[tuple[Tensor, int]], b: list[tuple[Tensor, int]]) -> bool:
    return len(a) == len(b) and all(x is y and m == n for (x, m), (y, n) in zip(a, b, strict=True))
