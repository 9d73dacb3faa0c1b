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

from spo.errors import UserError


@dataclass(frozen=True)
class Lora:
    """The LoRA of a UNet: its parameters are the policy."""

    parameters: Mapping[str, nn.Parameter]  # fp32, by their names inside the UNet
    layers: Mapping[str, BaseTunerLayer]  # that they change, by their names inside the UNet
    rank: int
    alpha: int
    target_modules: tuple[str, ...]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the parameters, without gradients."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Copy `weights` into the parameters."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

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
    """Add a trainable fp32 LoRA to `unet`: A gaussian with standard deviation 1/rank, B zero.

    Raises UserError when the UNet lacks a target.
    """
    linear = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    for target in target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            raise UserError(f"lora.target_modules: the UNet has no linear layer {target!r}.")
    unet.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,
            init_lora_weights="gaussian",
            target_modules=list(target_modules),
        )
    )
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


def is_in_use(unet: nn.Module) -> bool:
    """Whether `unet` runs with a LoRA beside its weights, rather than merged into them or without."""
    layers = (module for module in unet.modules() if isinstance(module, BaseTunerLayer))
    return any(not layer.disable_adapters for layer in layers)
