"""The latent reward model (LRM) in training: its start, its noisy latents, and the scores of pairs.

LPO, arXiv 2502.01051. The network is in spo/scorers/latent_reward.py.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextModelWithProjection

from spo.command_line.values import Checked, number
from spo.errors import UserError
from spo.hub import model_file
from spo.models.backbone import Backbone
from spo.models.decoder import pixels_per_latent
from spo.models.loading import ModelSource, freeze, load_pipeline
from spo.preference.batches import PairBatch
from spo.preference.pair_learner import PairScorer
from spo.preference.preparation import PairNoise, Preparation
from spo.run.folder import LRM_FILE, LRM_FOLDER
from spo.scorers.clip import load_part_of_clip, loading
from spo.scorers.latent_reward import (
    GUIDANCE,
    UP_PATH,
    LatentRewardModel,
    feature_width,
    tokenize,
)
from spo.scorers.latent_reward_export import save_latent_reward
from spo.scorers.latent_reward_folder import LatentRewardFolder
from spo.seeding import derive_seed

_PROJECTION, _INIT = "preference.text_projection", "preference.init_from"


@dataclass(frozen=True)
class LRMSource(Checked, section="preference"):
    """The LRM to start from; `config.preference` explains each field."""

    init_from: str
    text_projection: str
    guidance_scale: float = number(*GUIDANCE)
    guide_stages: bool

    def check(self, family: str, configs: Mapping[str, Mapping[str, Any]], image_size: int) -> None:
        """Raises UserError unless the start fits a base model, by its `configs` and small files."""
        unet, size = configs["unet"], configs["unet"]["sample_size"]
        sides = {size} if isinstance(size, int) else set(size)
        factor = pixels_per_latent(configs["vae"])
        if sides != {image_size / factor}:
            pixels = " x ".join(str(side * factor) for side in sides)
            raise UserError(
                f"data.image_size: {image_size}, but the images of pretrained.model, whose latents the "
                f"latent reward model judges, are of {pixels} pixels."
            )
        if self.init_from:
            self._folder.check_family(family, unet)
        elif family == "sd15":
            model_file(self.text_projection, "config.json", _PROJECTION)
            with loading(self.text_projection, _PROJECTION):
                text = CLIPConfig.from_pretrained(self.text_projection).text_config
            width = unet.get("cross_attention_dim", 1280)
            if text.hidden_size != width:
                raise UserError(
                    f"{_PROJECTION}: {self.text_projection!r} projects text of width "
                    f"{text.hidden_size}, but the text encoder of pretrained.model makes {width}."
                )

    @property
    def _folder(self) -> LatentRewardFolder:
        return LatentRewardFolder(self.init_from, _INIT)

    def build(
        self, base: "LatentBase", seed: int, gradient_checkpointing: bool
    ) -> LatentRewardModel:
        """Returns an LRM in fp32, to train; raises UserError if it cannot load.

        A fresh one takes its networks from `base`. Frozen is what no score depends on.
        """
        networks = base.hand_over()
        options = {
            "guidance_scale": self.guidance_scale,
            "guide_stages": self.guide_stages,
            "pixels_per_latent": base.vae_scale_factor,
        }
        if self.init_from:
            model = self._folder.load(**options)
        else:
            model = LatentRewardModel(*networks, *self._fresh_heads(*networks, seed), **options)
        model.requires_grad_(True).train()
        if model.text_encoder_2 is not None:
            _freeze_unread(model.text_encoder)
        if gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
            for encoder in filter(None, (model.text_encoder, model.text_encoder_2)):
                encoder.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def _fresh_heads(
        self, unet: nn.Module, encoders: list[nn.Module], seed: int
    ) -> tuple[nn.Linear, nn.Linear | None]:
        text = None
        if encoders[1:]:
            width = encoders[1].config.projection_dim
        else:
            kind = CLIPTextModelWithProjection
            clip = load_part_of_clip(kind, self.text_projection, _PROJECTION)
            text, width = clip.text_projection, clip.config.projection_dim
        visual = nn.Linear(feature_width(unet.config), width, bias=False)
        generator = torch.Generator().manual_seed(derive_seed(seed, "lrm"))
        visual.weight.data = 0.02 * torch.randn(visual.weight.shape, generator=generator)
        return visual, text

    def whole_unet(self, base: ModelSource, family: str) -> UNet2DConditionModel:
        """Returns the UNet that the model starts from with its up path, on the CPU in fp32."""
        if self.init_from:
            return self._folder.whole_unet()
        return load_pipeline(base, family, torch.float32).unet


def _freeze_unread(encoder: nn.Module) -> None:
    """Freezes what comes after the last hidden state but one, which SDXL reads of its first encoder."""
    last = f"layers.{encoder.config.num_hidden_layers - 1}."
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(last not in name and "final_layer_norm" not in name)


class LatentBase(Backbone):
    """The base model beside an LRM in training: VAE encoder, noise schedule and tokenizers.

    The down path of its UNet and its text encoders are in fp32 and the LRM's to take.
    """

    def _load(self, source: ModelSource) -> DiffusionPipeline:
        pipe = load_pipeline(source, self.family, torch.float32)
        for name in UP_PATH:
            delattr(pipe.unet, name)
        pipe.vae.decoder = nn.Identity()
        pipe.vae.to(self.dtype)
        return freeze(pipe, self.family, self.dtype)

    def hand_over(self) -> tuple[UNet2DConditionModel, list[nn.Module]]:
        """Returns the UNet's down path and the text encoders, which this object then lacks."""
        pipe, unet = self._pipe, self.unet
        names = [name for name in ("text_encoder", "text_encoder_2") if name in pipe.components]
        encoders = [getattr(pipe, name) for name in names]
        for name in ("unet", *names):
            setattr(pipe, name, None)
        self.unet = None
        return unet, encoders


@dataclass
class LRMPreparation(Preparation):
    """Prepares noisy latents of the images, each with noise of its own."""

    shares_noise = False
    validation_timesteps = (1, 251, 501, 701, 951)

    def noised(self, batch: PairBatch, noise: PairNoise) -> Tensor:
        """Returns latents (n, 2, C, h, w)."""
        return self.noisy_latents(self.clean_images(batch), noise)

    def validation_images(self, batch: PairBatch) -> Iterator[tuple[int, Tensor]]:
        """Yields timesteps and latents (n, 2, C, h, w): encoded once, noised by the same noise."""
        noise = self.draw_noise("validation", batch.places)
        latents = self.latents(self.clean_images(batch), noise.posterior)
        for timestep in self.validation_timesteps:
            yield timestep, self.schedule.add_noise(latents, noise.noise, timestep)

    def input_ids(self, batch: PairBatch) -> tuple[Tensor, ...]:
        """Returns token ids (n, L) of the prompts, for each text encoder."""
        found = tokenize(self.backbone.tokenizers.values(), batch.captions)
        return tuple(ids.to(self.backbone.device) for ids in found)


class LRMPairScorer(PairScorer):
    """Scores the noisy latents of pairs by an LRM; `whole_unet` returns the base model's UNet."""

    file, exported = LRM_FILE, LRM_FOLDER
    model: LatentRewardModel

    def __init__(
        self,
        model: LatentRewardModel,
        base: Backbone,
        whole_unet: Callable[[], UNet2DConditionModel],
    ) -> None:
        super().__init__(model)
        self.empty_ids = [ids.to(base.device) for ids in tokenize(base.tokenizers.values(), [""])]
        self.whole_unet = whole_unet

    def forward(self, latents: Tensor, timesteps: Tensor, *input_ids: Tensor) -> Tensor:
        """Returns fp32 scores (n, 2) of noisy latents (n, 2, C, h, w)."""
        ids = [torch.cat(both) for both in zip(input_ids, self.empty_ids, strict=True)]
        text = self.model.encode_text(ids)  # with gradients, the empty prompt once for all pairs
        pair_of = torch.arange(len(latents), device=latents.device).repeat_interleave(2)
        scores = self.model.score(
            latents.flatten(0, 1), timesteps[pair_of], text[pair_of], text[-1:]
        )
        return scores.unflatten(0, (-1, 2))

    def export(self, run_dir: Path) -> None:
        """Writes the model in the published layout."""
        save_latent_reward(run_dir / self.exported, self.model, self.whole_unet())
