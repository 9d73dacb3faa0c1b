"""PickScore: Kirstain et al., "Pick-a-Pic", NeurIPS 2023, arXiv 2305.01569."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from spo.scorers import CLIPInputs, PickScoreScorer, load_clip

_SECTION = "scorer_options.pickscore"


class PickScore:
    """exp(logit_scale) cos(image, text) of a CLIP, on images that its own processor prepares."""

    title, scale = "PickScore", 1.0

    def __init__(self, scorer: PickScoreScorer, inputs: CLIPInputs) -> None:
        self._scorer, self._inputs = scorer, inputs

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        prepared = self._inputs.image_processor(images=list(images), return_tensors="pt")
        features = self._scorer.encode_prompts(prompts)
        return self._scorer.score_pixels(prepared.pixel_values.to(features), features).cpu()


def load_pickscore(
    device: torch.device,
    *,
    backbone: str = "yuvalkirstain/PickScore_v1",
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
) -> PickScore:
    """PickScore with the CLIP `backbone`, and tokenizer and image processor of `processor`.

    Both are Hub ids or folders; UserError where they cannot be loaded.
    """
    inputs = CLIPInputs(processor, _SECTION)
    return PickScore(PickScoreScorer(load_clip(backbone, _SECTION), inputs, device), inputs)
