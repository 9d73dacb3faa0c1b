"""Preference pairs -> three noise predictions -> loss -> LoRA update -> EMA."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spo.method import ddim
from spo.method.ddim import DDIMSchedule
from spo.method.ema import distance, update_ema
from spo.method.losses import LossSettings, Objective
from spo.models.backbone import Backbone
from spo.models.lora import Lora
from spo.models.merged_lora import MergedLora
from spo.types import LossOutput, NoisePredictions, PreferencePairs


@dataclass(frozen=True)
class UpdateSettings:
    """How minibatches become updates; `config.train` explains each."""

    accumulation_steps: int
    max_grad_norm: float | None
    ema_decay: float
    ema_every: str  # "optimizer_step" or "window"
    merge_lora: bool  # lora.merge
    skip_ema_pass: bool  # train.ema_prediction == "none"


@dataclass(frozen=True)
class Step:
    """What one minibatch did."""

    output: LossOutput
    grad_norm: Tensor | None  # () before clipping, where the minibatch completed an update
    skipped: bool = False  # the fp16 gradients overflowed and the update was left out


class Learner:
    """Policy, EMA and reference on one UNet, and the optimizer that moves the policy.

    `unet` is the backbone's UNet or its DDP wrapper and is used for the pass with gradients alone.
    `reference` are the LoRA weights of the reference; None: the base model.
    """

    def __init__(
        self,
        backbone: Backbone,
        unet: nn.Module,
        lora: Lora,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        schedule: DDIMSchedule,
        loss_settings: LossSettings,
        settings: UpdateSettings,
        guidance_scale: float,
        reference: dict[str, Tensor] | None = None,
    ) -> None:
        self.backbone, self.unet, self.lora = backbone, unet, lora
        self.optimizer, self.objective, self.schedule = optimizer, objective, schedule
        self.loss_settings, self.settings = loss_settings, settings
        self.guidance_scale, self.reference = guidance_scale, reference
        self.ema = lora.snapshot() if objective.uses_ema else None
        self.merged = MergedLora(lora) if settings.merge_lora else None
        self.scaler = torch.amp.GradScaler(
            backbone.device.type, enabled=backbone.dtype == torch.float16
        )
        self.minibatches = 0  # since the start of training; accumulation runs across rollouts
        self.updates = 0
        self.skipped_in_a_row = 0  # updates left out, as their fp16 gradients overflowed

    def sampler(self) -> contextlib.AbstractContextManager:
        """Within the context the UNet is the network that draws candidates, without gradients."""
        return self.network("policy" if self.ema is None else "ema")

    def network(self, name: str) -> contextlib.AbstractContextManager:
        """Within the context the UNet is the "policy" or the "ema", for passes without gradients."""
        weights = self.ema if name == "ema" else self.lora.parameters
        if self.merged is not None:
            return self.merged.using(weights)
        return self.lora.using(self.ema) if name == "ema" else contextlib.nullcontext()

    def gradients(self) -> dict[str, Tensor]:
        """What this process has accumulated towards the next update."""
        parameters = self.lora.parameters.items()
        return {name: p.grad for name, p in parameters if p.grad is not None}

    def ema_distance(self) -> float | None:
        """Euclidean distance of the EMA LoRA from the policy's; None without EMA."""
        return None if self.ema is None else distance(self.ema, self.lora.parameters).item()

    def predict(self, pairs: PreferencePairs) -> NoisePredictions:
        """Guided epsilon predictions of all networks at the pairs' x_t; the policy's with gradients."""
        with torch.no_grad(), self.lora.using(self.reference):
            reference = self._epsilon(self.backbone.unet, pairs)
        ema = self._ema_epsilon(pairs, reference)
        # Last, so that a backward pass that recomputes activations finds the policy in place.
        return NoisePredictions(self._epsilon(self.unet, pairs), reference, ema)

    def _ema_epsilon(self, pairs: PreferencePairs, reference: Tensor) -> Tensor | None:
        if self.ema is None:
            return None
        if pairs.sampler_epsilon is not None:
            return pairs.sampler_epsilon
        if self.settings.skip_ema_pass:
            return reference  # without clips it cancels out of the loss, whatever it is
        with torch.no_grad(), self.network("ema"):
            return self._epsilon(self.backbone.unet, pairs)

    def _epsilon(self, unet: nn.Module, pairs: PreferencePairs) -> Tensor:
        n, latents_each = pairs.latents.shape[:2]
        latents = pairs.latents.flatten(0, 1)
        rows = torch.arange(n, device=latents.device).repeat_interleave(latents_each)
        timesteps = pairs.timesteps[rows]
        output = self.backbone.predict(
            unet, latents, timesteps, pairs.conditioning.select(rows), self.guidance_scale
        )
        abar = self.schedule.abar(timesteps, latents)
        return ddim.to_epsilon(self.schedule, output, latents, abar).unflatten(0, (n, latents_each))

    def train_minibatch(self, pairs: PreferencePairs, index_in_rollout: int) -> Step:
        """Add the gradients of `pairs`; every `accumulation_steps` minibatches, update the policy."""
        every = self.settings.accumulation_steps
        self.minibatches += 1
        completes_update = self.minibatches % every == 0
        local = not completes_update and hasattr(self.unet, "no_sync")
        with self.unet.no_sync() if local else contextlib.nullcontext():
            output = self.objective.loss(
                self.predict(pairs), pairs, self.schedule, self.loss_settings
            )
            self.scaler.scale(output.loss / every).backward()
        step = Step(replace(output, loss=output.loss.detach()), grad_norm=None)
        if completes_update:
            step = self._update(step)
        by_window = self.settings.ema_every == "window"
        moves = (index_in_rollout + 1) % every == 0 if by_window else completes_update
        if self.ema is not None and moves and (by_window or not step.skipped):
            update_ema(self.ema, self.lora.parameters, self.settings.ema_decay)
        return step

    def _update(self, step: Step) -> Step:
        self.scaler.unscale_(self.optimizer)
        limit = self.settings.max_grad_norm
        norm = nn.utils.clip_grad_norm_(
            self.lora.parameters.values(), float("inf") if limit is None else limit
        )
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        skipped = self.scaler.get_scale() < scale  # the scaler backs off where gradients overflowed
        self.updates += not skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return replace(step, grad_norm=norm, skipped=skipped)
