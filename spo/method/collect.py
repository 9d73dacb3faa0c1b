"""Prompts -> rollout -> decoded and scored candidates -> preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spo.command_line.values import Checked, choice, not_negative, whole
from spo.method.pairs import (
    PairSettings,
    choose,
    concatenate_pairs,
    differ_enough,
    make_pairs,
    no_pairs,
)
from spo.method.position import Position, TrainingState, chunks_left, epoch_order
from spo.method.rollout import RolloutSettings, stepwise_rollout
from spo.models import lora
from spo.models.gpu import memory_hint
from spo.seeding import derive_seed
from spo.types import Candidates, Comparison, Conditioning, PreferencePairs

if TYPE_CHECKING:
    from spo.launch.batch_plan import BatchPlan
    from spo.method.ddim import DDIM
    from spo.models.backbone import Backbone
    from spo.scorers import Scorer


@dataclass(frozen=True)
class Collected:
    """The result of a rollout."""

    pairs: PreferencePairs
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class CollectSettings(Checked, section="sample"):
    """Everything that shapes a rollout and its pairs."""

    rollout: RolloutSettings
    pairs: PairSettings
    guidance_scale: float = not_negative()
    decode_batch_size: int = whole()
    score_batch_size: int = whole()
    score_timestep: str = choice("t", "next")

    def timestep_told(self, candidates: Candidates, scorer: Scorer) -> int:
        """Returns the timestep that a scorer is told of candidates."""
        if scorer.looks_at == "images":
            return candidates.score_timestep
        drawn = candidates.window[-1]
        return drawn.timestep if self.score_timestep == "t" else drawn.next_timestep


@torch.no_grad()
def collect_rollout(
    backbone: Backbone,
    scorer: Scorer,
    sampler: DDIM,
    settings: CollectSettings,
    prompts: Sequence[str],
    prompt_ids: Tensor,
    generator: torch.Generator,
    before_step: Callable[[], None] = lambda: None,
) -> Collected:
    """Rolls out B prompts with the UNet's current weights, scores the candidates, and keeps pairs.

    An exception of `before_step` ends the rollout between two denoising steps.
    """
    conditioning = backbone.encode_prompts(prompts)
    prompt_features = scorer.encode_prompts(prompts)
    # The pair rule has a generator of its own: what it draws leaves the rollout's noise alone.
    rule = torch.Generator().manual_seed(derive_seed(generator.initial_seed(), "pairing"))
    parts, keep, comparisons = [], [], []
    for candidates in roll_out(backbone, sampler, settings, conditioning, generator, before_step):
        scores = score_candidates(
            candidates,
            backbone.decode_candidates,
            scorer,
            prompt_features,
            settings,
        )
        chosen = choose(scores, settings.pairs, rule)
        gaps = chosen.gap(scores)
        timestep = settings.timestep_told(candidates, scorer)
        comparisons.append(Comparison(timestep, scores, gaps))
        pairs = make_pairs(candidates, chosen, conditioning, prompt_ids, settings.pairs)
        parts.append(pairs)
        enough = differ_enough(candidates, gaps, settings.pairs)
        keep.append(enough.repeat(len(pairs) // max(1, len(enough))))
    kept = torch.cat(keep).nonzero().flatten()
    return Collected(concatenate_pairs(parts).select(kept), tuple(comparisons))


def roll_out(
    backbone: Backbone,
    sampler: DDIM,
    settings: CollectSettings,
    conditioning: Conditioning,
    generator: torch.Generator,
    before_step: Callable[[], None] = lambda: None,
) -> Iterator[Candidates]:
    """Yields the candidates of a rollout of B prompts with the UNet's current weights."""
    autocast = lora.is_in_use(backbone.unet)

    def network(latents: Tensor, timestep: int, rows: Conditioning) -> Tensor:
        before_step()
        return backbone.predict(
            backbone.unet, latents, timestep, rows, settings.guidance_scale, autocast
        )

    return stepwise_rollout(
        network, sampler, settings.rollout, conditioning, backbone.latent_shape, generator
    )


@torch.no_grad()
def score_candidates(
    candidates: Candidates,
    decode: Callable[[Tensor], Tensor],
    scorer: Scorer,
    prompt_features: Any,
    settings: CollectSettings,
) -> Tensor:
    """Returns scores (K, B) of the candidates.

    The scorer looks at their decoded images, or at the noisy latents themselves. The score of an image
    that is not finite is NaN, whatever the scorer returns for it.
    """
    at_images = scorer.looks_at == "images"
    latents = candidates.latents if at_images else candidates.window[-1].next_latents
    timestep = settings.timestep_told(candidates, scorer)
    key = "decode_batch_size" if at_images else "score_batch_size"
    batch_size = getattr(settings, key)
    k, b = latents.shape[:2]
    prompts = torch.arange(b, device=latents.device).repeat(k)
    scores = []
    rows_of = zip(latents.flatten(0, 1).split(batch_size), prompts.split(batch_size), strict=True)
    for part, rows in rows_of:
        with memory_hint("the scoring of candidates", f"lower sample.{key}"):
            seen = decode(part) if at_images else part
            found = scorer.score(seen, prompt_features[rows], timestep).float()
        # Checked here as a mask: looking at the numbers would wait for the GPU.
        overflowed = ~seen.isfinite().flatten(1).all(dim=1)
        scores.append(found.masked_fill(overflowed.to(found.device), torch.nan))
    return torch.cat(scores).reshape(k, b)


def join(parts: Sequence[Collected], backbone: Backbone, settings: PairSettings) -> Collected:
    """Joins the rollouts of one process; without any, returns 0 pairs in the right shapes."""
    comparisons = tuple(comparison for part in parts for comparison in part.comparisons)
    if parts:
        return Collected(concatenate_pairs([part.pairs for part in parts]), comparisons)
    nothing = backbone.encode_prompts([""])
    return Collected(no_pairs(nothing, backbone.latent_shape, settings), comparisons)


@dataclass(frozen=True)
class Slice:
    """The prompts that one process rolls out at once, and the generator of their noise."""

    prompt_ids: list[int]
    generator: torch.Generator


def slices_of(
    chunk: Sequence[int], plan: BatchPlan, seed: int, position: Position, rank: int
) -> list[Slice]:
    """Returns the slices of process `rank` of the rollout of the prompts `chunk` at `position`.

    The chunk is split into slices, process by process. A slice is seeded by its place in the chunk,
    so that one process with four slices draws the same as four processes with one slice.
    """
    rollout = (position.epochs, position.rollouts_in_epoch)
    slices = np.array_split(np.asarray(chunk), plan.slices * plan.num_processes)
    return [
        Slice(
            slices[place].tolist(),
            torch.Generator().manual_seed(derive_seed(seed, "rollout", *rollout, place)),
        )
        for place in range(rank * plan.slices, (rank + 1) * plan.slices)
    ]


def first_slices(num_prompts: int, plan: BatchPlan, seed: int, rollouts: int) -> list[Slice]:
    """Returns the slices of process 0 of a run's first `rollouts` in its first epoch."""
    order = epoch_order(num_prompts, seed, epoch=0)
    chunks = chunks_left(order, TrainingState(Position()), plan.prompts_per_rollout)
    slices = [
        slices_of(chunk, plan, seed, Position(rollouts_in_epoch=i), rank=0)
        for i, chunk in enumerate(chunks[:rollouts])
    ]
    return [part for own in slices for part in own if part.prompt_ids]
