"""The latent reward model (LRM): half a diffusion UNet and text encoders, which judge noisy latents.

Zhang et al., Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference
Optimization, NeurIPS 2025, arXiv 2502.01051. The score is exp(logit_scale) cos(image, text): the image
feature comes from the UNet's down path and middle, averaged over the image, the text feature from the
pooled output of a text encoder.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedTokenizerBase

from spo.data.token_lengths import readable

UP_PATH = ("up_blocks", "conv_norm_out", "conv_act", "conv_out")  # of a UNet; never needed here
LOGIT_SCALE = 2.6592  # log(1 / 0.07), where training starts
GUIDANCE = ("1 (off) or above", lambda scale: scale >= 1)  # what a guidance scale must be


@dataclass(frozen=True)
class PromptText:
    """n prompts as an LRM reads them; `text[rows]` selects by indices (m,) or a slice."""

    hidden: Tensor  # (n, L, D) for the cross-attention
    pooled: Tensor  # (n, P) of the last text encoder
    features: Tensor  # (n, F) of unit norm, fp32

    def __getitem__(self, rows: Tensor | slice) -> "PromptText":
        return PromptText(*(getattr(self, field.name)[rows] for field in fields(self)))


def down_path(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Returns the UNet that a diffusers config describes, up to and including its middle block."""
    unet = UNet2DConditionModel.from_config(config)
    for name in UP_PATH:
        delattr(unet, name)
    return unet


def feature_width(config: Mapping[str, Any]) -> int:
    """Returns the numbers that a UNet's stages and middle make: 4800 for SD1.5, 3520 for SDXL."""
    widths = config["block_out_channels"]
    return sum(widths) + widths[-1]


class LatentRewardModel(nn.Module):
    """Scores noisy latents (n, C, h, w) at timesteps (n,) for prompts.

    With a guidance scale g above 1 each latent passes twice, with its prompt and with the empty one,
    and the middle feature becomes m_null + g (m_text - m_null); with `guide_stages` the features of the
    stages, too. SDXL's first stage stays unguided, as in the official code.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoders: Sequence[nn.Module],
        visual_projection: nn.Linear,
        text_projection: nn.Linear | None,
        guidance_scale: float = 7.5,
        guide_stages: bool = False,
        pixels_per_latent: int = 8,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder, *second = text_encoders
        self.text_encoder_2 = second[0] if second else None
        self.visual_projection, self.text_projection = visual_projection, text_projection
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        self.guidance_scale, self.guide_stages = guidance_scale, guide_stages
        # Along a side; SDXL's UNet reads the image's size.
        self.pixels_per_latent = pixels_per_latent
        if guidance_scale != 1 and self.text_encoder_2 is None:
            _pass_once_before_text(unet)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Returns the text encoders in the order of the tokenizers."""
        return [e for e in (self.text_encoder, self.text_encoder_2) if e is not None]

    def encode_text(self, input_ids: Sequence[Tensor]) -> PromptText:
        """Returns the text of n prompts from token ids (n, L), one tensor for each text encoder."""
        first, *second = input_ids
        if self.text_encoder_2 is None:
            found = self.text_encoder(first)
            hidden, pooled = found.last_hidden_state, found.pooler_output
        else:
            found = [
                self.text_encoder(first, output_hidden_states=True),
                self.text_encoder_2(*second, output_hidden_states=True),
            ]
            # Of the last layer but one, without the final norm, as SDXL's UNet is used to.
            hidden = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
            pooled = found[1].text_embeds
        with _full_precision(pooled.device):
            features = pooled.float()
            if self.text_projection is not None:
                features = self.text_projection(features)
        return PromptText(hidden, pooled, unit(features))

    def image_features(
        self, latents: Tensor, timesteps: Tensor, text: PromptText, empty: PromptText | None
    ) -> Tensor:
        """Returns features (n, F), fp32 and not normalised; `empty` is the text of one empty prompt.

        `empty` is not read where the guidance scale is 1.
        """
        if self.guidance_scale == 1:
            pooled = self._pooled(latents, timesteps, text.hidden, text.pooled)
        else:
            hidden = torch.cat([text.hidden, empty.hidden.expand_as(text.hidden)])
            of_text = torch.cat([text.pooled, empty.pooled.expand_as(text.pooled)])
            both = self._pooled(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), hidden, of_text)
            pooled = [self._guided(stage, *values.chunk(2)) for stage, values in enumerate(both)]
        with _full_precision(latents.device):
            return self.visual_projection(torch.cat(pooled, dim=1))

    def _guided(self, stage: int, conditional: Tensor, unconditional: Tensor) -> Tensor:
        is_middle = stage == len(self.unet.down_blocks)
        is_first_of_sdxl = stage == 0 and self.text_encoder_2 is not None
        if is_middle or (self.guide_stages and not is_first_of_sdxl):
            return unconditional + self.guidance_scale * (conditional - unconditional)
        return conditional

    def _pooled(
        self, latents: Tensor, timesteps: Tensor, hidden: Tensor, pooled_text: Tensor
    ) -> list[Tensor]:
        """Returns the mean over the image of each stage and of the middle, (n, width) each, fp32.

        A stage's output is that of its last layer before the downsampler.
        """
        unet, latents = self.unet, latents.to(hidden.dtype)
        embedding = unet.time_embedding(unet.get_time_embed(latents, timesteps))
        if self.text_encoder_2 is not None:
            height, width = (side * self.pixels_per_latent for side in latents.shape[-2:])
            size = latents.new_zeros(
                len(latents), 6
            )  # (H, W, 0, 0, H, W), without waiting for a GPU
            size[:, 0::4], size[:, 1::4] = height, width
            added = {"text_embeds": pooled_text, "time_ids": size}
            embedding = embedding + unet.get_aug_embed(embedding, hidden, added)
        found, sample = [], unet.conv_in(latents)
        for block in unet.down_blocks:
            attends = getattr(block, "has_cross_attention", False)
            text = {"encoder_hidden_states": hidden} if attends else {}
            sample, outputs = block(sample, embedding, **text)
            found.append(_image_mean(outputs[len(block.resnets) - 1]))
        middle = unet.mid_block(sample, embedding, encoder_hidden_states=hidden)
        return [*found, _image_mean(middle)]

    def score(
        self, latents: Tensor, timesteps: Tensor, text: PromptText, empty: PromptText | None
    ) -> Tensor:
        """Returns exp(logit_scale) cos(image, text), (n,) fp32."""
        features = unit(self.image_features(latents, timesteps, text, empty))
        return self.logit_scale.float().exp() * (features * text.features).sum(dim=-1)


def unit(features: Tensor) -> Tensor:
    """Returns features (n, F) divided by their norm."""
    return features / features.norm(dim=-1, keepdim=True)


def _pass_once_before_text(unet: UNet2DConditionModel) -> None:
    """Lets the two halves of a guided pass share the layers before the first cross-attention.

    The latents are the same twice, and but for SDXL, whose time embedding has the text in it, no layer
    before it knows the prompt. For SD1.5 this saves 8 % of a pass.
    """
    first = unet.down_blocks[0]
    layers = [first.resnets[0]]
    if getattr(first, "has_cross_attention", False):
        layers.append(first.attentions[0].transformer_blocks[0].attn1)

    def first_half(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        return tree_map_only(Tensor, lambda rows: rows.chunk(2)[0], (args, kwargs))

    def twice(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return torch.cat([output, output])

    for layer in layers:
        layer.register_forward_pre_hook(first_half, with_kwargs=True)
        layer.register_forward_hook(twice)


def _image_mean(values: Tensor) -> Tensor:
    return values.float().mean(dim=(2, 3))


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Returns a context without mixed precision; the meta device has none."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def tokenize(tokenizers: Iterable[PreTrainedTokenizerBase], prompts: Sequence[str]) -> list[Tensor]:
    """Returns token ids (n, L) of each tokenizer, padded and truncated to its own length."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return [tokenizer(readable(prompts), **options).input_ids for tokenizer in tokenizers]
