"""The UNet as minibatches pass through it: recorded as CUDA graphs, which replay in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spo.errors import RunError, first_line


class MinibatchUNet(nn.Module):
    """A UNet for passes over minibatches of one size; smaller ones, a rollout's last, run as written.

    With `record` (CUDA only) each pass is recorded once and then replayed: the same kernels, without
    Python. A minibatch of SDXL is 50,000 of them, which take longer to launch than to run. The passes
    share the memory of their activations and keep it, so the backward pass of a minibatch must come
    before the next one's forward pass.

    `network` tells apart what is recorded: policy, EMA and reference differ in where their weights lie,
    and in whether the LoRA is on.
    """

    def __init__(self, unet: nn.Module, record: bool) -> None:
        super().__init__()
        self.unet, self.record = unet, record
        self.network = ""
        self._rows = 0  # of the largest minibatch
        self._recorded: dict[str, Callable[..., Tensor]] = {}
        self._pool: Any = None

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Returns what the UNet returns; raises RunError for a UNet that cannot be recorded."""
        if len(latents) > self._rows:
            self._rows = len(latents)
            self._recorded.clear()
        # A compiled UNet is compiled for rollouts.
        with torch.compiler.set_stance("force_eager"):
            if not self.record or len(latents) < self._rows:
                return self.unet(
                    latents,
                    timesteps,
                    encoder_hidden_states=encoder_hidden_states,
                    added_cond_kwargs=added_cond_kwargs,
                    return_dict=return_dict,
                )
            added = added_cond_kwargs or {}
            inputs = latents, timesteps, encoder_hidden_states, *added.values()
            if self.network not in self._recorded:
                one = _Pass(self.unet, tuple(added))
                self._recorded[self.network] = self._record(one, inputs)
            # A copy of what the next replay writes over.
            return (self._recorded[self.network](*inputs).clone(),)

    def _record(self, one: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        # The recording's stream is none that anything else runs on; torch waits for it, which is right.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        # Weights that autocast had cast for an earlier pass would be missing from the recording.
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            own = tuple(each.clone() for each in inputs)
            try:
                return torch.cuda.make_graphed_callables(one, own, pool=self._pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = f"the UNet's passes cannot be recorded ({first_line(error)})"
                raise RunError(f"cuda_graphs: {reason}; set it to False.") from error


class _Pass(nn.Module):
    """A UNet whose arguments are tensors only."""

    def __init__(self, unet: nn.Module, added: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.added = unet, added

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, *added: Tensor) -> Tensor:
        more = dict(zip(self.added, added, strict=True)) or None
        options = {"added_cond_kwargs": more, "return_dict": False}
        return self.unet(latents, timesteps, encoder_hidden_states=text, **options)[0]
