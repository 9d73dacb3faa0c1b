"""One rollout -> decoded and scored candidates -> preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spo.method.ddim import DDIMSchedule
from spo.method.pairs import PairSettings, best_against_worst, concatenate_pairs
from spo.method.rollout import RolloutSettings, stepwise_rollout
from spo.models import lora
from spo.models.backbone import Backbone
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
    parts, keep, comparisons = [], [], []
    for candidates in roll_out(backbone, schedule, settings, conditioning, generator, before_step):
        scores = score_candidates(
            candidates,
            backbone.decode_candidates,
            scorer,
            prompt_features,
            settings.decode_batch_size,
        )
        comparisons.append(Comparison(candidates.score_timestep, scores))
        pairs, differ = best_against_worst(
            candidates, scores, conditioning, prompt_ids, settings.pairs
        )
        parts.append(pairs)
        keep.append(differ)
    kept = torch.cat(keep).nonzero().flatten()
    return Collected(concatenate_pairs(parts).select(kept), tuple(comparisons))


def roll_out(
    backbone: Backbone,
    schedule: DDIMSchedule,
    settings: CollectSettings,
    conditioning: Conditioning,
    generator: torch.Generator,
    before_step: Callable[[], None] = lambda: None,
) -> Iterator[Candidates]:
    """What a rollout of the B prompts of `conditioning` compares, with the UNet as it stands."""
    autocast = lora.is_in_use(backbone.unet)

    def predict(latents: Tensor, timestep: int, rows: Conditioning) -> Tensor:
        before_step()
        return backbone.predict(
            backbone.unet, latents, timestep, rows, settings.guidance_scale, autocast
        )

    return stepwise_rollout(
        predict, schedule, settings.rollout, conditioning, backbone.latent_shape, generator
    )


@torch.no_grad()
def score_candidates(
    candidates: Candidates,
    decode: Callable[[Tensor], Tensor],
    scorer: Scorer,
    prompt_features: Tensor,
    batch_size: int,
) -> Tensor:
    """Returns scores (K, B) of the candidates, decoded and scored `batch_size` at a time.

    A scorer that looks at latents gets the noisy latents x_t' at the score's timestep, undecoded. An
    image or latent that is not finite scores NaN, whatever the scorer returns.
    """
    k, b = candidates.latents.shape[:2]
    if scorer.looks_at == "latents":
        latents, decode = candidates.window[-1].next_latents.flatten(0, 1), lambda noisy: noisy
    else:
        latents = candidates.latents.flatten(0, 1)
    of_row = torch.arange(b, device=latents.device).repeat(k)
    scores = []
    for part, rows in zip(latents.split(batch_size), of_row.split(batch_size), strict=True):
        images = decode(part)
        found = scorer.score(images, prompt_features[rows], candidates.score_timestep).float()
        # Not looked at here, which would wait for the GPU.
        overflowed = ~images.isfinite().flatten(1).all(dim=1)
        scores.append(found.masked_fill(overflowed.to(found.device), torch.nan))
    return torch.cat(scores).reshape(k, b)
