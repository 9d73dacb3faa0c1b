"""The optimizers of the LoRA: AdamW, and AdamW with moments of 8 bits."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spo.command_line.values import Checked, choice, not_negative, number, positive
from spo.errors import UserError, in_one_line

ADAMW = "adamw"
OPTIMIZERS = (ADAMW, "adamw8bit")
_KEY = "train.optimizer"
# As in bitsandbytes: smaller tensors stay in 32 bits, larger ones have a scale for each block.
_SMALLEST, _BLOCK, _LEVELS = 4096, 256, 256
_SHARED = ("qmap1", "qmap2")


@dataclass(frozen=True)
class OptimizerSettings(Checked, section="train"):
    """AdamW's numbers; `config.train` explains each."""

    optimizer: str = choice(*OPTIMIZERS)
    learning_rate: float = positive()
    adam_beta1: float = number("from 0 to below 1", lambda v: 0 <= v < 1)
    adam_beta2: float = number("from 0 to below 1", lambda v: 0 <= v < 1)
    adam_weight_decay: float = not_negative()
    adam_epsilon: float = positive()

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Returns the optimizer of `parameters`; UserError if it is not installed."""
        return make_optimizer(
            self.optimizer,
            parameters,
            lr=self.learning_rate,
            betas=(self.adam_beta1, self.adam_beta2),
            weight_decay=self.adam_weight_decay,
            eps=self.adam_epsilon,
        )


def check_optimizer(name: str, device: torch.device) -> None:
    """Raises UserError unless the optimizer `name` is installed and makes a step on `device`."""
    if name == ADAMW:
        return
    parameter = nn.Parameter(torch.zeros(_SMALLEST, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(name, [parameter])
    try:
        optimizer.step()
    # Whatever a library that was built for other devices raises.
    except Exception as error:
        raise UserError(
            f"{_KEY}: bitsandbytes does not run on {device.type} here ({type(error).__name__}: "
            f"{in_one_line(error)}); use adamw."
        ) from error


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], **options: Any
) -> torch.optim.Optimizer:
    """Returns the optimizer `name` with AdamW's `options`; UserError if it is not installed.

    On the meta device, where other libraries' kernels do not run, AdamW.
    """
    parameters = list(parameters)
    if name == ADAMW or parameters[0].is_meta:
        # On a GPU one kernel for all parameters; elsewhere torch's default.
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda or None, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f'{_KEY}: bitsandbytes is not installed ({error}); pip install "spo[bitsandbytes]", or '
            "use adamw."
        ) from error
    return AdamW8bit(parameters, **options)


@dataclass(frozen=True)
class Update:
    """One optimizer step."""

    grad_norm: Tensor  # () before clipping
    skipped: bool  # the fp16 gradients overflowed and the parameters stayed


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[nn.Parameter],
    max_grad_norm: float | None,
) -> Update:
    """Clips the gradients, makes one optimizer step, and clears the gradients; None: no clipping."""
    scaler.unscale_(optimizer)
    limit = float("inf") if max_grad_norm is None else max_grad_norm
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    # The scaler lowers its scale when gradients overflowed.
    return Update(norm, skipped=scaler.get_scale() < scale)


def moment_bytes(name: str, parameters: Iterable[Tensor]) -> int:
    """Returns the bytes of the two moments of fp32 `parameters`."""
    sizes = [parameter.numel() for parameter in parameters]
    if name == ADAMW:
        return 2 * 4 * sum(sizes)
    each = [2 * (n + 4 * math.ceil(n / _BLOCK)) if n >= _SMALLEST else 2 * 4 * n for n in sizes]
    return sum(each) + 2 * 4 * _LEVELS


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Returns optimizer state by kind and parameter name; no two tensors share memory."""
    return {
        # The levels of 8-bit moments are one tensor for all parameters.
        f"{kind}:{name}": value.clone() if kind in _SHARED else torch.as_tensor(value).contiguous()
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Restores optimizer state by kind and parameter name."""
    for key, tensor in tensors.items():
        kind, name = key.split(":")
        parameter = parameters[name]
        if kind == "step" and not tensor.is_floating_point():
            value = tensor.item()  # bitsandbytes counts its steps in Python
        else:
            # AdamW keeps `step` on the CPU unless it is fused.
            on_cpu = kind == "step" and not optimizer.defaults["fused"]
            # Copied: kernels may round differently on mapped files.
            value = tensor.to("cpu" if on_cpu else parameter.device, copy=True)
        optimizer.state[parameter][kind] = value
