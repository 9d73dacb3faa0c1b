"""Labels from PickScore in place of people's (SPO's SDXL model)."""

from __future__ import annotations

import torch
from torch import Tensor

from spo.scorers import Scorer


def labels_of_scores(scores: Tensor, margin: float) -> Tensor:
    """Labels (n,) of scores (n, 2): 1 or 0, or 0.5 unless their softmax differs by over `margin`."""
    difference = scores.softmax(dim=-1) @ scores.new_tensor([1.0, -1.0])
    return torch.where(difference.abs() > margin, (difference > 0).float(), 0.5)


def relabel(scorer: Scorer, images: Tensor, captions: list[str], margin: float) -> Tensor:
    """Labels (n,) of clean images (n, 2, 3, H, W) in [-1, 1] by `scorer`."""
    features = scorer.encode_prompts(captions).repeat_interleave(2, dim=0)
    scores = scorer.score(images.flatten(0, 1), features, timestep=0)
    return labels_of_scores(scores.view(-1, 2), margin)
