"""ImageReward's BLIP in transformers' classes, from the published state dict.

BLIP: Li et al., arXiv 2201.12086. In the checkpoint, "blip.visual_encoder." is a ViT with timm's names,
and "blip.text_encoder." a BERT with cross attention and transformers' names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

# timm's names -> transformers'.
_VISION = (
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
    """A vision tower, and a text tower that attends to the image."""

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel) -> None:
        super().__init__()
        self.vision, self.text = vision, text

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the first token (n, D) of texts (n, L) that attend to pixels (n, 3, S, S)."""
        image = self.vision(pixels).last_hidden_state
        output = self.text(input_ids, attention_mask=attention_mask, encoder_hidden_states=image)
        return output.last_hidden_state[:, 0]


def build_blip(weights: Mapping[str, Tensor], head_width: int) -> Blip:
    """Returns the towers in a checkpoint; the shapes of `weights` tell all sizes but `head_width`.

    Raises KeyError, ValueError or RuntimeError for a missing or unknown tensor or another shape.
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
        name = re.sub(f"^{pattern}", replacement, name)
    return name  # strict loading names an unknown one


def _vision_config(weights: Mapping[str, Tensor], head_width: int) -> BlipVisionConfig:
    _, positions, width = weights["embeddings.position_embedding"].shape
    patch_size = weights["embeddings.patch_embedding.weight"].shape[-1]
    return BlipVisionConfig(
        **_sizes(weights, "encoder.layers.", "mlp.fc1.weight", width, head_width),
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
        **_sizes(weights, "encoder.layer.", "intermediate.dense.weight", width, head_width),
        vocab_size=vocabulary,
        encoder_hidden_size=image_width,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        pad_token_id=0,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # transformers' name for a text tower with cross attention
    )


def _sizes(
    weights: Mapping[str, Tensor], layers: str, mlp: str, width: int, head_width: int
) -> dict[str, int]:
    """Returns the sizes of a tower whose `layers` prefix and first `mlp` weight have these names."""
    if head_width < 1 or width % head_width:
        raise ValueError(f"head_width {head_width} does not divide its width of {width}")
    return {
        "hidden_size": width,
        "intermediate_size": len(weights[f"{layers}0.{mlp}"]),
        "num_hidden_layers": len(
            {name.split(".")[2] for name in weights if name.startswith(layers)}
        ),
        "num_attention_heads": width // head_width,
    }
