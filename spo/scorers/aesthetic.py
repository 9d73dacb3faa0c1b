"""LAION's aesthetic predictor v2: github.com/christophschuhmann/improved-aesthetic-predictor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from spo.errors import UserError
from spo.hub import resolve_file
from spo.scorers.open_clip import OpenClipScorer
from spo.scorers.state_dicts import linear_head, read_state_dict


class Aesthetic(OpenClipScorer):
    """A rating of about 1 to 10 from a CLIP's unit-norm image features; prompts play no part.

    `model` and `checkpoint` as in `OpenClipScorer`; `head`: LAION's MLP, or its single linear layer.
    Raises UserError for files that cannot be loaded, and for a CLIP without QuickGELU: the heads belong
    to OpenAI's CLIP, which has it.
    """

    title = "Aesthetic"

    def __init__(
        self,
        device: torch.device,
        section: str,
        *,
        model: str = "ViT-L-14-quickgelu",
        checkpoint: str = "openai",
        # sac+logos+ava1-l14-linearMSE of the project above, in TRL's copy on the Hub.
        head: str = "hf://trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth",
    ) -> None:
        super().__init__(device, section, model, checkpoint)
        if not self.architecture.get("quick_gelu", False):
            raise UserError(f"{section}.model: {model!r} has no QuickGELU, as OpenAI's CLIPs have.")
        key = f"{section}.head"
        path = resolve_file(head, key)
        weights = read_state_dict(path, key)
        try:
            self._head = linear_head(weights, self.architecture["embed_dim"]).to(device)
        except ValueError as error:
            raise UserError(f"{key}: {path} is no head for this CLIP: {error}.") from error

    @torch.no_grad()
    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._head(self.image_features(images))[:, 0].cpu()
