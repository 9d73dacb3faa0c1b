"""One rollout -> decoded and scored candidates -> preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.backbone import Backbone
from spo.ddim import DDIMSchedule
from spo.errors import RunError
from spo.pairs import PairSettings, concatenate_pairs, select_pairs
from spo.rollout import RolloutSettings, stepwise_rollout
from spo.scorers import Scorer
from spo.types import Candidates, Conditioning, PreferencePairs


@dataclass(frozen=True)
class Comparison:
    """The scores of one comparison of a rollout; they outlive its candidates."""

    score_timestep: int  # what the preference model was told
    scores: Tensor  # (K, B)


@dataclass(frozen=True)
class Collected:
    """What a rollout brought in."""

    pairs: PreferencePairs
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class CollectSettings:
    """Everything that shapes a rollout and its pairs."""

    rollout: RolloutSettings
    pairs: PairSettings
    guidance_scale: float
    decode_batch_size: int


@torch.no_grad()
def collect_rollout(
    backbone: Backbone,
    scorer: Scorer,
    schedule: DDIMSchedule,
    settings: CollectSettings,
    prompts: Sequence[str],
    prompt_ids: Tensor,
    generator: torch.Generator,
    before_step: Callable[[], None] = lambda: None,
) -> Collected:
    """Roll out B prompts with the UNet as it stands; score the candidates as they come, keep pairs.

    What `before_step` raises ends the rollout between two denoising steps.
    """
    conditioning = backbone.encode_prompts(prompts)
    prompt_features = scorer.encode_prompts(prompts)

    def predict(latents: Tensor, timestep: int, rows: Conditioning) -> Tensor:
        before_step()
        return backbone.predict(backbone.unet, latents, timestep, rows, settings.guidance_scale)

    parts, comparisons = [], []
    for candidates in stepwise_rollout(
        predict, schedule, settings.rollout, conditioning, backbone.latent_shape, generator
    ):
        scores = score_candidates(
            candidates, backbone.decode, scorer, prompt_features, settings.decode_batch_size
        )
        comparisons.append(Comparison(candidates.score_timestep, scores))
        parts.append(select_pairs(candidates, scores, conditioning, prompt_ids, settings.pairs))
    return Collected(concatenate_pairs(parts), tuple(comparisons))


@torch.no_grad()
def score_candidates(
    candidates: Candidates,
    decode: Callable[[Tensor], Tensor],
    scorer: Scorer,
    prompt_features: Tensor,
    batch_size: int,
) -> Tensor:
    """Scores (K, B) of the candidates' images, decoded and scored `batch_size` at a time."""
    k, b = candidates.latents.shape[:2]
    latents = candidates.latents.flatten(0, 1)
    of_row = torch.arange(b, device=latents.device).repeat(k)
    scores = [
        scorer.score(decode(part), prompt_features[rows], candidates.score_timestep)
        for part, rows in zip(latents.split(batch_size), of_row.split(batch_size), strict=True)
    ]
    return torch.cat(scores).float().reshape(k, b)


def check_scores(comparisons: Sequence[Comparison], prompts: Sequence[str]) -> None:
    """Raise RunError that names timestep and prompts where a score is not finite."""
    for comparison in comparisons:
        bad = ~comparison.scores.isfinite().all(dim=0)
        if bad.any():
            named = [prompts[i] for i in bad.nonzero().flatten().tolist()]
            raise RunError(
                f"scores are not finite at t = {comparison.score_timestep} for the prompts {named}; "
                "the scorer or the sampler overflowed: try mixed_precision=bf16 or "
                "preference.dtype=float32, or lower train.learning_rate."
            )
