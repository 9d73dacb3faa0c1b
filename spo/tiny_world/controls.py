"""A control from which nothing can be learned: preferences that are turned round at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from spo.scorers import Scorer, ScorerSource, load_scorer


def flipped_preferences(
    device: torch.device, checkpoint: str, backbone: str, seed: int = 0
) -> Scorer:
    """The preference model of `checkpoint`, best and worst exchanged in half of the comparisons."""
    source = ScorerSource("step_aware_clip", checkpoint, backbone, backbone, "float32", {})
    return _Flipped(load_scorer(source, device), seed)


class _Flipped(Scorer):
    def __init__(self, scorer: Scorer, seed: int) -> None:
        self._scorer, self._seed = scorer, seed

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return self._scorer.encode_prompts(prompts)

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        scores = self._scorer.score(images, prompt_features, timestep)
        # One sign for all candidates of a prompt at a timestep, in whatever slices they come.
        signs = [self._sign(row, timestep) for row in prompt_features.expand(len(images), -1).cpu()]
        return scores * torch.tensor(signs, device=scores.device)

    def _sign(self, features: Tensor, timestep: int) -> float:
        key = f"{self._seed} {timestep} ".encode() + features.numpy().tobytes()
        return 1.0 if hashlib.sha256(key).digest()[0] % 2 else -1.0
