"""The arithmetic of the official GradSPO training code, as a baseline on the same card.

`spo.costs.meter` runs these models as it runs ours, and they draw the same pairs. As in the official
code

- three UNets are in memory, each with weights of its own: policy, EMA (which draws the candidates) and
  reference (the base model without LoRA);
- the LoRA runs beside the weights under autocast, also without gradients, and peft casts its input;
- the preference model encodes the text of every image that it scores;
- the VAE decodes as diffusers has it, the final images twice, and they are scored twice;
- the EMA averages all weights of the UNet, frozen ones included, tensor by tensor, each time that
  `accumulation_steps` minibatches of a rollout are done;
- a minibatch passes through the reference, then the EMA, then the policy, all with guidance.

All else is ours: samplers, batches [unconditional, conditional], slices of images that are decoded at
once, loss, optimizer, clipping. Left out, because they are not the arithmetic of a step: the official
code's data loading, logging, gathering between processes, and tokenizing prompts anew (token ids are
kept, the text tower is run). Only the final images' place in a rollout is told by timestep 0, so
`sample.final_score_timestep` counts as "zero".
"""

import contextlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn

from spo.costs.load import Models
from spo.method.learner import Learner, Step
from spo.models.backbone import Backbone
from spo.scorers import Scorer
from spo.scorers.clip import text_features
from spo.scorers.pickscore import CLIPScorer
from spo.types import NoisePredictions, PreferencePairs


def official_arithmetic(models: Models) -> Models:
    """Returns `models` of GradSPO with a CLIP as its scorer, changed in place to the baseline."""
    recipe, collect = models.recipe, models.recipe.collect
    rollout = replace(collect.rollout, final_score_timestep="zero")
    return replace(
        models,
        scorer=OfficialScorer(models.scorer, models.backbone),
        learner=OfficialLearner(models.learner),
        recipe=replace(recipe, collect=replace(collect, rollout=rollout)),
    )


class OfficialLearner(Learner):
    """Policy, EMA and reference as three UNets."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(
            learner.backbone,
            learner.backbone.unet,
            learner.lora,
            learner.optimizer,
            learner.loss,
            learner.sampler,
            replace(learner.settings, merge=False),
        )
        self.scaler = learner.scaler
        self.backbone.vae.decoder.mid_block._forward_hooks.clear()  # our keep_contiguous
        for layer in self.lora.layers.values():
            layer.cast_input_dtype_enabled = True  # peft's default
        self.ema_unet = deepcopy(self.unet).requires_grad_(False)
        self.reference_unet = deepcopy(self.unet).requires_grad_(False)
        self.reference_unet.unload_lora()
        self.ema = None  # `train_minibatch` moves the EMA's UNet instead

    def drawing_network(self) -> contextlib.AbstractContextManager:
        """Within the context the backbone's UNet is the EMA's."""
        return mock.patch.object(self.backbone, "unet", self.ema_unet)

    def train_minibatch(self, pairs: PreferencePairs, index_in_rollout: int) -> Step:
        """Trains as ours; the EMA moves by minibatches of the rollout, whatever the optimizer did."""
        step = super().train_minibatch(pairs, index_in_rollout)
        if (index_in_rollout + 1) % self.settings.accumulation_steps == 0:
            average_weights(self.ema_unet, self.unet, self.settings.ema_decay)
        return step

    def predict(self, pairs: PreferencePairs) -> NoisePredictions:
        """Returns the epsilon of the three UNets at the pairs' x_t, the policy's with gradients."""
        with torch.no_grad():
            reference = self._epsilon(self.reference_unet, pairs)
            ema = self._epsilon(self.ema_unet, pairs)
        return NoisePredictions(self._epsilon(self.unet, pairs), reference, ema)


@torch.no_grad()
def average_weights(average: nn.Module, policy: nn.Module, decay: float) -> None:
    """Sets average = decay average + (1 - decay) policy for all parameters, in their own dtypes."""
    for mean, new in zip(average.parameters(), policy.parameters(), strict=True):
        mean.mul_(decay).add_(new, alpha=1 - decay)


class OfficialScorer(Scorer):
    """A CLIP that encodes the text of each image, and sees the final images twice."""

    def __init__(self, scorer: CLIPScorer, backbone: Backbone) -> None:
        self.scorer, self.backbone = scorer, backbone
        self.title, self.tokenizers = scorer.title, scorer.tokenizers
        self._decode = backbone.decode_candidates
        backbone.decode_candidates = self.decode

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Returns token ids (B, L)."""
        return self.scorer.inputs.tokenize(prompts).to(self.scorer.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images of `latents`, and remembers these for a second time."""
        self.latents = latents
        return self._decode(latents)

    @torch.no_grad()
    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        if timestep == 0:
            again = self.backbone.decode_candidates(self.latents)
            self._score(again, prompt_features, timestep)
        return self._score(images, prompt_features, timestep)

    def _score(self, images: Tensor, tokens: Tensor, timestep: int) -> Tensor:
        text = text_features(self.scorer.clip, tokens)
        return self.scorer.score(images, text, timestep)
