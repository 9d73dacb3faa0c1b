"""Preference pairs -> three noise predictions -> loss -> LoRA update -> EMA."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spo.command_line.values import Checked, choice, number, positive, whole
from spo.errors import UserError
from spo.method.metrics import Metrics, divergence
from spo.models.lora import Lora, MergedLora
from spo.models.minibatch_unet import MinibatchUNet
from spo.models.optimizers import Update, apply_gradients
from spo.types import LossOutput, NoisePredictions, PreferencePairs

if TYPE_CHECKING:
    from spo.method.ddim import DDIM
    from spo.method.losses import Loss
    from spo.models.backbone import Backbone


@dataclass(frozen=True)
class UpdateSettings(Checked, section="train"):
    """Settings of the updates; `config.train` explains each."""

    accumulation_steps: int  # minibatches of one optimizer step
    guidance_scale: float  # sample.guidance_scale
    merge: bool  # lora.merge
    max_grad_norm: float | None = positive()
    max_skipped_updates: int = whole()
    clip_eps: float | None
    ema_decay: float = number("from 0 to 1", lambda v: 0 <= v <= 1)
    ema_every: str = choice("optimizer_step", "window")
    ema_prediction: str = choice("fresh", "rollout", "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema_prediction == "none" and self.clip_eps is not None:
            raise UserError(
                "train.ema_prediction: without the EMA's prediction the clips cannot be computed; set "
                "train.clip_eps=None with 'none', or use 'fresh' or 'rollout'."
            )


@dataclass(frozen=True)
class Step:
    """The result of one minibatch."""

    output: LossOutput
    update: Update | None  # None if the minibatch only added to the gradients
    # By timestep: each pair's `metrics.divergence`, NaN for the pairs of other timesteps, (n,).
    kl_at: Mapping[int, Tensor]

    @property
    def is_update(self) -> bool:
        """True if the policy moved."""
        return self.update is not None and not self.update.skipped

    def note(self, metrics: Metrics) -> None:
        """Adds the numbers of the minibatch to `metrics`."""
        metrics.mean("loss", self.output.loss)
        for name, values in self.output.terms.items():
            metrics.mean(name, values)
        for timestep, values in self.kl_at.items():
            metrics.nanmean(f"kl_at/{timestep}", values)
        if self.is_update:
            metrics.mean("grad_norm", self.update.grad_norm)


class Learner:
    """Policy, EMA and reference on one UNet, and the optimizer that moves the policy.

    `unet` is the backbone's UNet, or that inside MinibatchUNet, DDP, or both; DDP's wrapper is used for
    the pass with gradients alone.
    `reference` are the LoRA weights of the reference; None: the base model.
    """

    def __init__(
        self,
        backbone: Backbone,
        unet: nn.Module,
        lora: Lora,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        sampler: DDIM,
        settings: UpdateSettings,
        reference: dict[str, Tensor] | None = None,
    ) -> None:
        self.backbone, self.unet, self.lora = backbone, unet, lora
        found = (part for part in unet.modules() if isinstance(part, MinibatchUNet))
        self.minibatch_unet = next(found, None)
        self.optimizer, self.loss, self.sampler = optimizer, loss, sampler
        self.settings, self.reference = settings, reference
        self.ema = lora.snapshot() if loss.uses_ema else None
        self.merged = MergedLora(lora) if settings.merge else None
        is_fp16 = backbone.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(backbone.device.type, enabled=is_fp16)
        self.minibatches = 0  # since the start of training; accumulation runs across rollouts
        self.updates = 0
        self.skipped_in_a_row = 0  # updates that were skipped because fp16 gradients overflowed

    def train_minibatch(self, pairs: PreferencePairs, index_in_rollout: int) -> Step:
        """Adds the gradients of `pairs`; after `accumulation_steps` of these, moves policy and EMA."""
        every = self.settings.accumulation_steps
        self.minibatches += 1
        self._make_gradients()
        completes_update = self.minibatches % every == 0
        # DDP averages the gradients over the processes once per update.
        waits = not completes_update and hasattr(self.unet, "no_sync")
        with self.unet.no_sync() if waits else contextlib.nullcontext():
            predictions = self.predict(pairs)
            output = self.loss(predictions, pairs, self.sampler)
            self.scaler.scale(output.loss / every).backward()
        update = self._update_policy() if completes_update else None
        output = replace(output, loss=output.loss.detach())
        step = Step(output, update, self._kl_at(predictions, pairs))
        by_window = self.settings.ema_every == "window" and (index_in_rollout + 1) % every == 0
        by_update = self.settings.ema_every == "optimizer_step" and step.is_update
        if self.ema is not None and (by_window or by_update):
            update_ema(self.ema, self.lora.parameters, self.settings.ema_decay)
            self.changed(self.ema)
        return step

    def _make_gradients(self) -> None:
        # A recorded backward pass writes to memory of its own: autograd must add that to the gradient
        # of each minibatch, not take it for the gradient.
        if self.minibatch_unet is not None and self.minibatch_unet.record:
            for parameter in self.lora.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _kl_at(self, predictions: NoisePredictions, pairs: PreferencePairs) -> dict[int, Tensor]:
        kl = divergence(predictions, pairs, self.sampler)
        at = pairs.timesteps
        return {t: kl.masked_fill(at != t, torch.nan) for t in self.sampler.timesteps}

    def predict(self, pairs: PreferencePairs) -> NoisePredictions:
        """Returns the epsilon of all three networks at the pairs' x_t, the policy's with gradients."""
        with torch.no_grad(), self.lora.using(self.reference):
            reference = self._epsilon(self._unet_of("reference"), pairs)
        ema = self._ema_epsilon(pairs, reference)
        # Last, so that a backward pass that recomputes activations finds the policy in place.
        policy = self._epsilon(self._unet_of("policy"), pairs)
        return NoisePredictions(policy, reference, ema)

    def _ema_epsilon(self, pairs: PreferencePairs, reference: Tensor) -> Tensor | None:
        if self.ema is None:
            return None
        if pairs.sampler_epsilon is not None:
            return pairs.sampler_epsilon
        if self.settings.ema_prediction == "none":
            return reference  # any value works: without clipping it cancels from the loss
        with torch.no_grad(), self.network("ema"):
            return self._epsilon(self._unet_of("ema"), pairs)

    def _unet_of(self, network: str) -> nn.Module:
        if self.minibatch_unet is not None:
            self.minibatch_unet.network = network
        if network == "policy":
            return self.unet
        return self.backbone.unet if self.minibatch_unet is None else self.minibatch_unet

    def _epsilon(self, unet: nn.Module, pairs: PreferencePairs) -> Tensor:
        n, latents_each = pairs.latents.shape[:2]
        latents = pairs.latents.flatten(0, 1)
        rows = torch.arange(n, device=latents.device).repeat_interleave(latents_each)
        timesteps, conditioning = pairs.timesteps[rows], pairs.conditioning.select(rows)
        scale = self.settings.guidance_scale
        output = self.backbone.predict(unet, latents, timesteps, conditioning, scale)
        epsilon = self.sampler.predict(output, latents, timesteps).epsilon
        return epsilon.unflatten(0, (n, latents_each))

    def _update_policy(self) -> Update:
        parameters, limit = self.lora.parameters.values(), self.settings.max_grad_norm
        update = apply_gradients(self.optimizer, self.scaler, parameters, limit)
        self.changed(self.lora.parameters)
        self.updates += not update.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if update.skipped else 0
        return update

    def changed(self, weights: Mapping[str, Tensor]) -> None:
        """Says that `weights`, the policy's parameters or the EMA, have changed in place."""
        if self.merged is not None:
            self.merged.forget(weights)

    def drawing_network(self) -> contextlib.AbstractContextManager:
        """Within the context the UNet is the network that draws candidates, without gradients."""
        return self.network("policy" if self.ema is None else "ema")

    def network(self, name: str) -> contextlib.AbstractContextManager:
        """Within the context the UNet is the "policy" or the "ema", for passes without gradients."""
        weights = self.ema if name == "ema" else self.lora.parameters
        if self.merged is not None:
            return self.merged.using(weights)
        return self.lora.using(self.ema) if name == "ema" else contextlib.nullcontext()

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradients that this process has accumulated towards the next update."""
        parameters = self.lora.parameters.items()
        return {name: p.grad for name, p in parameters if p.grad is not None}

    def ema_distance(self) -> float | None:
        """Returns the Euclidean distance of the EMA LoRA from the policy's; None without EMA."""
        return None if self.ema is None else distance(self.ema, self.lora.parameters).item()


@torch.no_grad()
def update_ema(ema: Mapping[str, Tensor], policy: Mapping[str, Tensor], decay: float) -> None:
    """Sets ema = decay ema + (1 - decay) policy, in place."""
    # All at once: on a GPU a few kernels instead of one for each of SDXL's 1,120 tensors.
    torch._foreach_lerp_(list(ema.values()), [policy[name] for name in ema], 1 - decay)


@torch.no_grad()
def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
    """Returns the Euclidean distance between two sets of tensors with the same names, ()."""
    return torch.stack([(a[name] - b[name]).square().sum() for name in a]).sum().sqrt()
