"""ImageReward: Xu et al., NeurIPS 2023, arXiv 2304.05977."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from spo.data.token_lengths import readable
from spo.errors import UserError, in_one_line
from spo.hub import resolve_file
from spo.scorers import ImageScorer
from spo.scorers.blip import Blip, build_blip
from spo.scorers.clip import loading
from spo.scorers.state_dicts import linear_head, read_state_dict

# Mean and standard deviation of the rewards, and the length of a text, from the published code.
_MEAN, _STD, _TOKENS = 0.16717362830052426, 1.0333394966054072, 35
_USED = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.")
# In the checkpoint, but no part of the reward.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")


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
        checkpoint: str = "hf://THUDM/ImageReward/ImageReward.pt",
        tokenizer: str = "google-bert/bert-base-uncased",
        head_width: int = 64,
    ) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        blip, head = _read(checkpoint, f"{section}.checkpoint", head_width)
        self._blip, self._head, self._device = blip.to(device), head.to(device), device
        with loading(tokenizer, f"{section}.tokenizer"):
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        # Resize, centre crop and normalisation are those of OpenAI's CLIP.
        preprocess = PreprocessCfg(size=blip.vision.config.image_size)
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
        features = self._blip(pixels, tokens.input_ids, tokens.attention_mask)
        return ((self._head(features)[:, 0] - _MEAN) / _STD).cpu()


def _read(checkpoint: str, key: str, head_width: int) -> tuple[Blip, nn.Module]:
    path = resolve_file(checkpoint, key)
    weights = read_state_dict(path, key)
    head = {k.removeprefix("mlp."): v for k, v in weights.items() if k.startswith("mlp.")}
    unknown = [k for k in weights if not k.startswith(_USED + _UNUSED)]
    try:
        if unknown:
            raise ValueError(f"{unknown[0]} is unknown")
        blip = build_blip(weights, head_width)
        return blip, linear_head(head, blip.text.config.hidden_size)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{key}: {path} is not ImageReward: {in_one_line(error)}") from error
