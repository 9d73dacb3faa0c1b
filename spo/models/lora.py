"""One UNet, several networks: LoRA tensors swapped or switched off in place.

Policy, EMA sampler and reference differ in their LoRA alone, so the base weights exist once. The
parameters that the optimizer and DDP know keep their identity; only what they point to changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from spo.command_line.values import Checked, choice, whole
from spo.errors import UserError


@dataclass(frozen=True)
class LoraSettings(Checked, section="lora"):
    """The LoRA of a run; `config.lora` explains each."""

    rank: int = whole()
    alpha: int | None = whole()
    target_modules: tuple[str, ...]
    init_from: str
    merge: bool
    reference: str = choice("base", "init")

    def __post_init__(self) -> None:
        super().__post_init__()
        modules = self.target_modules
        if not modules or not all(isinstance(name, str) for name in modules):
            raise UserError("lora.target_modules: name at least one layer, and nothing but layers.")
        if self.reference == "init" and not self.init_from:
            raise UserError("lora.reference: 'init' needs lora.init_from to name a LoRA.")

    def add_to(self, unet: nn.Module, seed: int) -> Lora:
        """Adds a fresh LoRA to `unet`; its alpha is the rank if lora.alpha is None."""
        alpha = self.rank if self.alpha is None else self.alpha
        return add_lora(unet, self.rank, alpha, self.target_modules, seed)


@dataclass(frozen=True)
class Lora:
    """The LoRA of a UNet: its parameters are the policy."""

    parameters: Mapping[str, nn.Parameter]  # fp32, by their names inside the UNet
    layers: Mapping[str, BaseTunerLayer]  # that they change, by their names inside the UNet
    rank: int
    alpha: int
    target_modules: tuple[str, ...]

    def snapshot(self) -> dict[str, Tensor]:
        """Returns a copy of the parameters, without gradients."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Copies `weights` into the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Returns ||dW|| / ||W||, W the weights that the LoRA changes, dW = alpha / rank B A, ().

        Frobenius norms over all layers together. dW is never built: ||B A||^2 = tr(B^T B A A^T).
        """
        changes, weights = [], []
        for name, layer in self.layers.items():
            # In fp64: a GPU may round fp32 products to TF32.
            down, up = (factor.double() for factor in factors(self.parameters, name))
            changes.append(((up.T @ up) * (down @ down.T)).sum())
            weight = layer.base_layer.weight
            weights.append(torch.linalg.vector_norm(weight, dtype=torch.float32))
        change = self.alpha / self.rank * torch.stack(changes).sum().clamp(min=0).sqrt()
        return change / torch.stack(weights).norm()

    @contextlib.contextmanager
    def using(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Within the context the UNet runs with `weights` (not copied); None: as the base model."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        was_enabled = not any(layer.disable_adapters for layer in self.layers.values())
        try:
            self._point_to(own if weights is None else weights, enabled=weights is not None)
            yield
        finally:
            self._point_to(own, was_enabled)

    def _point_to(self, weights: Mapping[str, Tensor], enabled: bool) -> None:
        for layer in self.layers.values():
            if layer.disable_adapters == enabled:
                layer.enable_adapters(enabled)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(True)  # which peft's switch turns off
            parameter.data = weights[name]
        # Autocast caches low-precision copies of parameters and would not see that they changed.
        torch.clear_autocast_cache()


def add_lora(
    unet: nn.Module, rank: int, alpha: int, target_modules: Sequence[str], seed: int
) -> Lora:
    """Adds a trainable fp32 LoRA to `unet`: A gaussian with standard deviation 1/rank, B zero.

    Raises UserError if the UNet lacks a target.
    """
    linear = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise UserError(f"lora.target_modules: the UNet has no linear layer {target!r}.")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(target_modules)
    )
    unet.add_adapter(config)
    parameters = {name: p for name, p in unet.named_parameters() if "lora_" in name}
    # peft drew from the global generator of its device; ours makes the same LoRA on every device.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank)
    layers = {n: layer for n, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer)}
    for layer in layers.values():
        # Under autocast peft would take its input to fp32 and autocast back again: two copies for
        # nothing. Without autocast input and LoRA are both in fp32.
        layer.cast_input_dtype_enabled = False
    return Lora(parameters, layers, rank, alpha, tuple(target_modules))


def factors(weights: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) of a layer, by its name inside the UNet."""
    return tuple(weights[f"{layer}.lora_{factor}.default.weight"] for factor in "AB")


def is_in_use(unet: nn.Module) -> bool:
    """Tells if `unet` runs with a LoRA beside its weights, neither merged into them nor off."""
    layers = (module for module in unet.modules() if isinstance(module, BaseTunerLayer))
    return any(not layer.disable_adapters for layer in layers)


class MergedLora:
    """W + alpha / rank B A of each weight W that a LoRA changes, for passes without gradients.

    A pass costs as much as the base model's. The sums are kept until other weights are used, or
    until `forget`. The originals are kept, so the base model comes back bit for bit, which subtracting
    would not do. Takes the memory of these weights once more, in their dtype, from its first use.
    """

    def __init__(self, lora: Lora) -> None:
        self._lora = lora
        self._merged: dict[str, Tensor] = {}
        self._made_of: Mapping[str, Tensor] | None = None

    def forget(self, weights: Mapping[str, Tensor]) -> None:
        """Says that `weights` have changed: their next use merges them anew.

        No tensor tells: optimizers with kernels of their own do not raise its version.
        """
        if self._made_of is weights:
            self._made_of = None

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
        if self._made_of is weights:
            return
        self._made_of = None  # until all sums are of these weights
        for name, layer in self._lora.layers.items():
            base = layer.base_layer.weight
            down, up = factors(weights, name)
            # In fp32, then rounded once.
            merged = torch.addmm(base.float(), up, down, alpha=self._lora.alpha / self._lora.rank)
            if name in self._merged:
                self._merged[name].copy_(merged)
            else:
                self._merged[name] = merged.to(base.dtype)
        self._made_of = weights
