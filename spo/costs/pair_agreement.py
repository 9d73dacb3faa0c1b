"""How far a run's pairs hang on what scores its candidates: several judges of the same rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from spo import scorers
from spo.costs.meter import DECODING, SCORING, Meter
from spo.errors import UserError
from spo.method import build
from spo.method.collect import CollectSettings, Comparison, roll_out, score_candidates
from spo.method.ddim import DDIMSchedule
from spo.method.health import check_scores
from spo.method.pairs import PairSettings, differ_enough
from spo.models import backbone
from spo.models.backbone import Backbone
from spo.models.decoder import decode, load_decoder
from spo.scorers import Scorer
from spo.types import Candidates

# With other values of these, and of `preference`, a rollout has the same candidates.
_SCORING_KEYS = (
    "sample.decoder",
    "sample.decode_batch_size",
    "sample.threshold",
    "sample.keep_all_final",
)


@dataclass(frozen=True)
class Judged:
    """What a judge makes of n comparisons of K candidates."""

    timesteps: Tensor  # (n,) int64, what the preference model was told
    scores: Tensor  # (n, K)
    kept: Tensor  # (n,) bool: best and worst make a pair

    def at(self, timestep: int) -> Judged:
        """The comparisons at a timestep."""
        rows = self.timesteps == timestep
        return Judged(self.timesteps[rows], self.scores[rows], self.kept[rows])


@dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the same comparisons; shares are from 0 to 1."""

    comparisons: int
    best: float  # share with the same best candidate
    worst: float
    both: float
    both_of_pairs: float  # the same among the pairs that the first judge keeps; NaN without any
    kept: float  # share that both keep as a pair, or neither does
    correlation: float  # Pearson's, of the scores less their mean over the candidates


def agreement(one: Judged, other: Judged) -> Agreement:
    """How far two judges of the same comparisons (at least one) agree."""
    best = one.scores.argmax(dim=1) == other.scores.argmax(dim=1)
    worst = one.scores.argmin(dim=1) == other.scores.argmin(dim=1)
    # Prompts and timesteps move all scores of a comparison together, which decides nothing.
    centred = [(j.scores - j.scores.mean(dim=1, keepdim=True)).flatten() for j in (one, other)]
    return Agreement(
        comparisons=len(one.scores),
        best=best.double().mean().item(),
        worst=worst.double().mean().item(),
        both=(best & worst).double().mean().item(),
        both_of_pairs=(best & worst)[one.kept].double().mean().item(),
        kept=(one.kept == other.kept).double().mean().item(),
        correlation=torch.corrcoef(torch.stack(centred).double())[0, 1].item(),
    )


@dataclass(frozen=True)
class Judge:
    """A way to score candidates and to keep pairs; `meter` has what decoding and scoring took."""

    decoder: nn.Module
    scorer: Scorer
    pairs: PairSettings
    decode_batch_size: int
    meter: Meter

    def judge(self, candidates: Candidates, prompts: Sequence[str], features: Tensor) -> Judged:
        """One comparison of each of B prompts; RunError where a score is not finite."""
        with self.meter.each_call({SCORING: (self.scorer, "score")}):
            scores = score_candidates(
                candidates,
                self.meter.measured(partial(decode, self.decoder), DECODING),
                self.scorer,
                features,
                self.decode_batch_size,
            )
        check_scores([Comparison(candidates.score_timestep, scores)], prompts)
        return Judged(
            torch.full((len(prompts),), candidates.score_timestep),
            scores.T.cpu(),
            differ_enough(candidates, scores, self.pairs).cpu(),
        )


@torch.no_grad()
def judge_rollout(
    model: Backbone,
    schedule: DDIMSchedule,
    settings: CollectSettings,
    judges: Sequence[Judge],
    prompts: Sequence[str],
    generator: torch.Generator,
) -> list[list[Judged]]:
    """Roll out B prompts once with the UNet as it stands; what each judge makes of each step."""
    conditioning = model.encode_prompts(prompts)
    features = [judge.scorer.encode_prompts(prompts) for judge in judges]
    steps = [
        [
            judge.judge(candidates, prompts, known)
            for judge, known in zip(judges, features, strict=True)
        ]
        for candidates in roll_out(model, schedule, settings, conditioning, generator)
    ]
    return [list(of_judge) for of_judge in zip(*steps, strict=True)]


def concatenate(parts: Sequence[Judged]) -> Judged:
    """All comparisons of `parts` (at least one), in order."""
    names = ("timesteps", "scores", "kept")
    return Judged(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def check_change(config: ConfigDict, key: str | None = None) -> None:
    """Raise UserError for what is wrong with `config`, and for a changed `key` that draws otherwise."""
    if key is not None and key not in _SCORING_KEYS and not key.startswith("preference."):
        raise UserError(
            f"--compare: {key} changes the rollout itself; what can be compared are "
            f"{', '.join(_SCORING_KEYS)} and the keys of preference."
        )
    build.check(config)
    backbone.check_source(build.rollout_source(config), config.family)
    scorers.check_scorer(build.scorer_source(config))


def load_judges(model: Backbone, config: ConfigDict, others: Sequence[ConfigDict]) -> list[Judge]:
    """The judge of `config`, whose base model `model` is, then those of the `others`.

    What is the same in several of them is loaded once.
    """
    decoders, loaded = {None: model.vae, config.sample.decoder: model.decoder}, []
    judges = []
    for each in (config, *others):
        name, source = each.sample.decoder, build.scorer_source(each)
        if name not in decoders:
            decoder = load_decoder(build.rollout_source(each).decoder, model.dtype)
            decoders[name] = decoder.to(model.device)
        scorer = next((scorer for known, scorer in loaded if known == source), None)
        if scorer is None:
            scorer = scorers.load_scorer(source, model.device)
            loaded.append((source, scorer))
        pairs, size = build.pair_settings(each), each.sample.decode_batch_size
        judges.append(Judge(decoders[name], scorer, pairs, size, Meter(model.device)))
    return judges
