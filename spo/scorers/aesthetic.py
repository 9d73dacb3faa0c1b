"""LAION's aesthetic predictor v2: github.com/christophschuhmann/improved-aesthetic-predictor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from spo.errors import UserError
from spo.hub import resolve_file
from spo.scorers import ImageScorer
from spo.scorers.linear_heads import linear_head
from spo.scorers.open_clip import OpenClip, load_open_clip
from spo.scorers.state_dicts import read_state_dict


class Aesthetic(ImageScorer):
    """A rating of about 1 to 10 from a CLIP's unit-norm image features; prompts play no part."""

    title = "Aesthetic"

    def __init__(self, clip: OpenClip, head: nn.Module) -> None:
        self._clip, self._head = clip, head

    @torch.no_grad()
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._head(self._clip.image_features(map(self._clip.transform, images)))[:, 0].cpu()


def load_aesthetic(
    device: torch.device,
    section: str,
    *,
    model: str = "ViT-L-14-quickgelu",
    checkpoint: str = "openai",
    # sac+logos+ava1-l14-linearMSE of the project above, in TRL's copy on the Hub.
    head: str = "hf://trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
) -> Aesthetic:
    """Returns the predictor with the weights in `head`: LAION's MLP, or its single linear layer.

    `model` and `checkpoint` as in `load_open_clip`. Raises UserError for files that cannot be loaded
    and for a CLIP without QuickGELU: the heads belong to OpenAI's CLIP, which has it.
    """
    clip, key = load_open_clip(model, checkpoint, section, device), f"{section}.head"
    if not clip.quick_gelu:
        raise UserError(f"{section}.model: {model!r} has no QuickGELU, as OpenAI's CLIPs have.")
    path = resolve_file(head, key)
    try:
        layers = linear_head(read_state_dict(path, key), clip.width)
    except ValueError as error:
        raise UserError(f"{key}: {path} is no head for this CLIP: {error}.") from error
    return Aesthetic(clip, layers.to(device))
