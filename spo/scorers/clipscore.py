"""CLIPScore: Hessel et al., EMNLP 2021, arXiv 2104.08718."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from spo.scorers.open_clip import OpenClip, load_open_clip


class CLIPScore:
    """max(cos(image, text), 0) of a CLIP.

    Printed times 100, as papers on image generation do, and the prompt stands for itself; Hessel et al.
    have 2.5 for 100, and "A photo depicts" before each text.
    """

    title, scale = "CLIPScore", 100.0

    def __init__(self, clip: OpenClip) -> None:
        self._clip = clip

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        image = self._clip.image_features([self._clip.transform(image) for image in images])
        return (image * self._clip.text_features(prompts)).sum(dim=-1).clamp(min=0).cpu()


def load_clipscore(
    device: torch.device, *, model: str = "ViT-L-14-quickgelu", checkpoint: str = "openai"
) -> CLIPScore:
    """CLIPScore, by default of OpenAI's ViT-L/14; `model` and `checkpoint` as in `load_open_clip`."""
    return CLIPScore(load_open_clip(model, checkpoint, "scorer_options.clipscore", device))
