"""The BLIP of ImageReward in transformers' classes, from a published state dict.

BLIP: Li et al., arXiv 2201.12086. In the checkpoint, "blip.visual_encoder." is a ViT in timm's names,
"blip.text_encoder." a BERT with cross attention, whose names are transformers' own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

_VISION = (  # timm's names to transformers'
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class Blip(nn.Module):
    """Vision tower and text tower; the text looks at the image."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel) -> None:
        super().__init__()
        self.vision, self.text = vision, text

    @property
    def image_size(self) -> int:
        return self.vision.config.image_size

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """First token (n, D) of texts (n, L) that have seen normalised pixels (n, 3, S, S)."""
        image = self.vision(pixels).last_hidden_state
        output = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=image)
        return output.last_hidden_state[:, 0]


def build_blip(weights: Mapping[str, Tensor], head_width: int) -> Blip:
    """The towers of a checkpoint's `weights`, whose shapes tell all sizes but the attention heads'.

    KeyError, ValueError or RuntimeError where a tensor is missing, unknown or of another shape.
    """
    vision = {_vision_name(k): v for k, v in _part(weights, "blip.visual_encoder.").items()}
    text = _part(weights, "blip.text_encoder.")
    text.pop("embeddings.position_ids", None)  # a constant that old transformers saved
    image_width = vision["embeddings.class_embedding"].shape[-1]
    blip = Blip(
        BlipVisionModel(_vision_config(vision, head_width)),
        BlipTextModel(_text_config(text, image_width, head_width), add_pooling_layer=False),
    )
    blip.vision.load_state_dict(vision, strict=True)
    blip.text.load_state_dict(text, strict=True)
    return blip.requires_grad_(False).eval()


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    return name  # unknown: loading strictly will say so


def _vision_config(weights: Mapping[str, Tensor], head_width: int) -> BlipVisionConfig:
    _, positions, width = weights["embeddings.position_embedding"].shape
    patch_size = weights["embeddings.patch_embedding.weight"].shape[-1]
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(weights, "encoder.layers."),
        num_attention_heads=_heads(width, head_width),
        image_size=math.isqrt(positions - 1) * patch_size,
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )


def _text_config(
    weights: Mapping[str, Tensor], image_width: int, head_width: int
) -> BlipTextConfig:
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=len(weights["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_layers(weights, "encoder.layer."),
        num_attention_heads=_heads(width, head_width),
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        pad_token_id=0,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # which is how transformers calls a text tower with cross attention
    )


def _heads(width: int, head_width: int) -> int:
    if head_width < 1 or width % head_width:
        raise ValueError(f"head_width {head_width} does not divide its width of {width}")
    return width // head_width


def _layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({k.removeprefix(prefix).split(".")[0] for k in weights if k.startswith(prefix)})
