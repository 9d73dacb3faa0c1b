"""ImageReward: Xu et al., NeurIPS 2023, arXiv 2304.05977.

Its BLIP (Li et al., arXiv 2201.12086) in transformers' classes. In the published state dict,
"blip.visual_encoder." is a ViT with timm's names, and "blip.text_encoder." a BERT with cross attention
and transformers' names.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from spo.data.token_lengths import readable
from spo.errors import UserError, in_one_line
from spo.scorers import ImageScorer
from spo.scorers.clip import loading
from spo.scorers.state_dicts import linear_head, read_state_dict

# Mean and standard deviation of the rewards, and the length of a text, from the published code.
_MEAN, _STD, _TOKENS = 0.16717362830052426, 1.0333394966054072, 35
_DEPTHS = {768: 12, 1024: 24}  # layers of a BERT-base or ViT-B, of a ViT-L
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


class ImageReward(ImageScorer):
    """A reward from a BLIP's multimodal features, with mean 0 and variance 1 over its data.

    `checkpoint`: the published state dict, a path or hf://user/repo/file. `tokenizer`: a Hub id or
    folder. `head_width`: width of an attention head in both towers, the one size that the shapes of the
    weights do not tell. Raises UserError for files that cannot be loaded.
    """

    title = "ImageReward"

    def __init__(
        self,
        device: torch.device,
        section: str,
        *,
        checkpoint: str = "hf://zai-org/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        head_width: int = 64,
    ) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        key = f"{section}.checkpoint"
        weights = read_state_dict(checkpoint, key)
        try:
            networks = _networks(weights, head_width)
        except (LookupError, ValueError, RuntimeError) as error:
            fault = f"it lacks {error}" if isinstance(error, KeyError) else in_one_line(error)
            raise UserError(f"{key}: {checkpoint} is not ImageReward: {fault}") from error
        self._networks, self._device = networks.requires_grad_(False).eval().to(device), device
        with loading(tokenizer, f"{section}.tokenizer"):
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        # Resize, centre crop and normalisation are those of OpenAI's CLIP.
        preprocess = PreprocessCfg(size=networks[0].config.image_size)
        self._transform = image_transform_v2(preprocess, is_train=False)

    @torch.no_grad()
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        pixels = torch.stack([self._transform(image) for image in images]).to(self._device)
        tokens = self._tokenizer(
            readable(prompts),
            padding="max_length",
            truncation=True,
            max_length=_TOKENS,
            return_tensors="pt",
        ).to(self._device)
        vision, text, head = self._networks
        image = vision(pixels).last_hidden_state
        # The text attends to the image; its first token sums up both.
        ids, mask = tokens.input_ids, tokens.attention_mask
        output = text(ids, attention_mask=mask, encoder_hidden_states=image)
        reward = head(output.last_hidden_state[:, 0])[:, 0]
        return ((reward - _MEAN) / _STD).cpu()


def _networks(weights: Mapping[str, Tensor], head_width: int) -> nn.ModuleList:
    """Returns image tower, text tower and head; raises LookupError, ValueError or RuntimeError."""
    vision = _part(weights, "blip.visual_encoder.")
    for pattern, replacement in _VISION:
        vision = {re.sub(f"^{pattern}", replacement, name): v for name, v in vision.items()}
    text = _part(weights, "blip.text_encoder.")
    text.pop("embeddings.position_ids", None)  # a constant that old transformers saved
    vision_config, text_config = _configs(vision, text, head_width)
    towers = (BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False))
    for tower, tensors in zip(towers, (vision, text), strict=True):
        tower.load_state_dict(tensors, strict=True)
    head = linear_head(_part(weights, "mlp."), towers[1].config.hidden_size)
    return nn.ModuleList([*towers, head])


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _configs(
    vision: Mapping[str, Tensor], text: Mapping[str, Tensor], head_width: int
) -> tuple[BlipVisionConfig, BlipTextConfig]:
    positions = vision["embeddings.position_embedding"].shape[1]
    patch_size = vision["embeddings.patch_embedding.weight"].shape[-1]
    vision_config = BlipVisionConfig(
        **_sizes(vision, ".mlp.fc1.weight", head_width),
        image_size=math.isqrt(positions - 1) * patch_size,
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text_config = BlipTextConfig(
        **_sizes(text, ".intermediate.dense.weight", head_width),
        vocab_size=len(text["embeddings.word_embeddings.weight"]),
        encoder_hidden_size=vision_config.hidden_size,
        max_position_embeddings=len(text["embeddings.position_embeddings.weight"]),
        pad_token_id=0,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # transformers' name for a text tower with cross attention
    )
    return vision_config, text_config


def _sizes(weights: Mapping[str, Tensor], mlp: str, head_width: int) -> dict[str, int]:
    """Returns the sizes of a tower; `mlp` ends the name of the first MLP weight of each layer."""
    numbers = [re.search(r"encoder\.layers?\.(\d+)\.", name) for name in weights]
    depth = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    shapes = [weight.shape for name, weight in weights.items() if name.endswith(mlp)]
    if not shapes:
        raise LookupError(f"every {mlp.strip('.')} is missing")
    inner, width = shapes[0]
    # Nothing but its width tells that a tower lacks its last layers.
    if depth != _DEPTHS.get(width, depth):
        raise ValueError(f"a tower of width {width} lacks layers from {depth} on")
    if head_width < 1 or width % head_width:
        raise ValueError(f"head_width {head_width} does not divide its width of {width}")
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": width // head_width,
    }
