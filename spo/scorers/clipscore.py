"""CLIPScore: Hessel et al., EMNLP 2021, arXiv 2104.08718."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from spo.scorers.open_clip import OpenClipScorer


class CLIPScore(OpenClipScorer):
    """max(cos(image, text), 0) of a CLIP, by default OpenAI's ViT-L/14.

    Printed times 100, without a prefix to the prompt, as papers on image generation do; Hessel et al.
    multiply by 2.5 and put "A photo depicts" before each text. Options as in `OpenClipScorer`.
    """

    title, scale = "CLIPScore", 100.0

    def __init__(
        self,
        device: torch.device,
        section: str,
        *,
        model: str = "ViT-L-14-quickgelu",
        checkpoint: str = "openai",
    ) -> None:
        super().__init__(device, section, model, checkpoint)

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return super().score_images(images, prompts).clamp(min=0)
