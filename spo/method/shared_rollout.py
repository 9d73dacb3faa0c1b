"""One rollout of all processes: each draws its slices, then all share the pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spo.data.prompts import epoch_order
from spo.launch.batch_plan import BatchPlan
from spo.launch.workers import Workers
from spo.method import metrics
from spo.method.collect import Collected, CollectSettings, collect_rollout
from spo.method.health import check_scores
from spo.method.learner import Learner
from spo.method.pairs import concatenate_pairs, no_pairs
from spo.method.position import Position, RolloutInProgress
from spo.models.backbone import Backbone
from spo.scorers import Scorer
from spo.seeding import derive_seed


@dataclass(frozen=True)
class Slice:
    """The prompts that one process rolls out at once, and what their noise is drawn from."""

    prompt_ids: list[int]
    generator: torch.Generator


def slices_of(
    chunk: Sequence[int], plan: BatchPlan, seed: int, position: Position, rank: int
) -> list[Slice]:
    """The slices of process `rank` of the rollout of the prompts `chunk` at `position`.

    The chunk is split into slices, process by process. A slice is seeded by its place in the chunk,
    so that one process with four slices draws what four processes with one slice draw.
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
    """The slices of process 0 of a run's first `rollouts` in its first epoch, or of all there are."""
    order, size = epoch_order(num_prompts, seed, epoch=0), plan.prompts_per_rollout
    starts = range(0, num_prompts, size)[:rollouts]
    return [
        part
        for i, start in enumerate(starts)
        for part in slices_of(
            order[start : start + size], plan, seed, Position(rollouts_in_epoch=i), rank=0
        )
        if part.prompt_ids
    ]


@dataclass(frozen=True)
class SharedRollout:
    """What rollouts are drawn with; `before_step` may raise, before each denoising step."""

    backbone: Backbone
    scorer: Scorer
    learner: Learner
    settings: CollectSettings
    plan: BatchPlan
    prompts: Sequence[str]
    seed: int
    workers: Workers
    before_step: Callable[[], None]

    def draw(self, chunk: Sequence[int], position: Position) -> RolloutInProgress:
        """Roll out the prompts `chunk` on all processes, shuffle their pairs and deal them out.

        RunError on every process where a score is not finite, and likewise what `before_step` raises.
        """
        started = time.perf_counter()
        collected, generator = self._draw_slices(chunk, position)
        timesteps = self.learner.schedule.timesteps[self.settings.rollout.branch_from :]
        sums = metrics.rollout_sums(collected.comparisons, collected.pairs.timesteps, timesteps)
        pairs, left_over = self.workers.deal(collected.pairs, generator)
        return RolloutInProgress(
            pairs=pairs,
            steps=(),
            sums=self.workers.sum(sums),
            prompts=len(chunk),
            used=0,
            left_over=left_over,
            seconds_rollout=time.perf_counter() - started,
            seconds_train=0.0,
        )

    def _draw_slices(
        self, chunk: Sequence[int], position: Position
    ) -> tuple[Collected, torch.Generator]:
        """This process's share of a rollout, and the generator that shuffles the pairs of all."""
        mine = slices_of(chunk, self.plan, self.seed, position, self.workers.rank)
        with self.workers.together():
            collected = [self._collect(s.prompt_ids, s.generator) for s in mine if s.prompt_ids]
        if collected:
            pairs = concatenate_pairs([part.pairs for part in collected])
        else:
            pairs = no_pairs(
                self.backbone.encode_prompts([""]), self.backbone.latent_shape, self.settings.pairs
            )
        comparisons = tuple(c for part in collected for c in part.comparisons)
        return Collected(pairs, comparisons), mine[0].generator

    def _collect(self, prompt_ids: list[int], generator: torch.Generator) -> Collected:
        """Roll out one slice with the sampler; RunError where a score is not finite."""
        prompts = [self.prompts[i] for i in prompt_ids]
        with self.learner.sampler():
            collected = collect_rollout(
                self.backbone,
                self.scorer,
                self.learner.schedule,
                self.settings,
                prompts,
                torch.tensor(prompt_ids, device=self.workers.device),
                generator,
                self.before_step,
            )
        check_scores(collected.comparisons, prompts)
        return collected
