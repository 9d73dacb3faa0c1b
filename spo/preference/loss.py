"""The loss of the SPM, which is PickScore's (arXiv 2305.01569): pure functions of features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairFeatures:
    """The SPM's features, of unit norm, of n pairs."""

    image: Tensor  # (n, 2, D)
    text: Tensor  # (n, D)
    scale: Tensor  # () exp(logit_scale)

    @property
    def scores(self) -> Tensor:
        """Scores of both images, (n, 2)."""
        return self.scale * (self.image @ self.text[:, :, None]).squeeze(-1)


def pair_losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns (n,) cross-entropies of softmax(scores), (n, 2), and labels (n,), P(image 0 wins).

    For a tie log 2 is subtracted, so that a perfect tie costs 0.
    """
    targets = torch.stack([labels, 1 - labels], dim=-1)
    return -(targets * scores.log_softmax(dim=-1)).sum(dim=-1) - _tie_entropy(labels)


def in_batch_losses(
    mine: PairFeatures, everyone: PairFeatures, valid: Tensor, first: int, labels: Tensor
) -> Tensor:
    """Returns (n,) losses with the other pairs of the minibatch as negatives.

    Each is the mean of two cross-entropies: of the preferred image over the prompts, and of the prompt
    over all images. `labels` (n,) are P(image 0 wins). Row i of `mine` is row `first` + i of
    `everyone`, whose rows count only if `valid` (N,).
    """
    total, rows = len(everyone.text), torch.arange(len(labels), device=labels.device)
    own = first + rows
    hidden = ~valid.repeat(len(labels), 1)  # (n, N)
    hidden[rows, own] = False
    over_texts = mine.scale * mine.image @ everyone.text.T
    over_texts = over_texts.masked_fill(hidden[:, None], -math.inf)  # (n, 2, N)
    over_images = mine.scale * mine.text @ everyone.image.transpose(0, 1).flatten(0, 1).T
    over_images = over_images.masked_fill(hidden.repeat(1, 2), -math.inf)  # (n, 2 N)
    of_text = over_texts.log_softmax(dim=-1)[rows, :, own]
    of_image = over_images.log_softmax(dim=-1).unflatten(1, (2, total))[rows, :, own]
    targets = torch.stack([labels, 1 - labels], dim=-1)
    return (-(targets * (of_text + of_image)).sum(dim=-1) - _tie_entropy(labels)) / 2


def _tie_entropy(labels: Tensor) -> Tensor:
    return (labels == 0.5) * math.log(2)


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Returns the share of the peak learning rate at optimizer step `step` (from 0).

    Linear warm-up, then linear decay to 0, as transformers' get_linear_schedule_with_warmup.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
