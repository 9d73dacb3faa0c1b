"""Measures how much a run's pairs depend on the scorer: several judges score the same rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial

import torch
from accelerate import PartialState
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

from spo.command_line.config_files import leaves
from spo.errors import UserError
from spo.launch.batch_plan import plan_batches
from spo.method.build import Recipe, build_lora, read_recipe
from spo.method.collect import CollectSettings, first_slices, roll_out, score_candidates
from spo.method.ddim import DDIM
from spo.method.health import check_scores
from spo.method.pairs import PairSettings, choose, differ_enough
from spo.models.backbone import Backbone
from spo.models.decoder import decode, load_decoder
from spo.models.loading import check_source
from spo.run.tables import markdown_table
from spo.scorers import Scorer, check_scorer, load_scorer
from spo.types import Candidates, Comparison

# A judge consists of these keys and of the section `preference`; all other keys shape the rollout.
_JUDGE = (
    "sample.decoder",
    "sample.decode_batch_size",
    "sample.threshold",
    "sample.keep_all_final",
    "sample.pairing",
)


@dataclass(frozen=True)
class Judged:
    """The verdicts of one judge on n comparisons of K candidates."""

    timesteps: Tensor  # (n,) int64, as the preference model was told
    scores: Tensor  # (n, K)
    chosen: Tensor  # (n, 2) int64, the best and the worst candidate
    kept: Tensor  # (n,) bool: best and worst make a pair

    def select(self, rows: Tensor) -> Judged:
        """Returns the comparisons at `rows`."""
        return Judged(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Agreement:
    """The agreement of two judges on the same comparisons; shares are from 0 to 1."""

    comparisons: int
    best: float  # share with the same best candidate
    worst: float
    both: float
    both_of_pairs: float  # the same among the pairs that the first judge keeps; NaN without any
    kept: float  # share that both keep as a pair, or neither does
    correlation: float  # Pearson's, of the scores less their mean over the candidates


def agreement(one: Judged, other: Judged) -> Agreement:
    """Returns the agreement of two judges of the same comparisons (at least one)."""
    same = one.chosen == other.chosen  # (n, 2)
    best, worst, both = same[:, 0], same[:, 1], same.all(dim=1)
    # Prompts and timesteps move all scores of a comparison together, which decides nothing.
    centred = [(j.scores - j.scores.mean(dim=1, keepdim=True)).flatten() for j in (one, other)]
    return Agreement(
        comparisons=len(one.scores),
        best=best.double().mean().item(),
        worst=worst.double().mean().item(),
        both=both.double().mean().item(),
        both_of_pairs=both[one.kept].double().mean().item(),
        kept=(one.kept == other.kept).double().mean().item(),
        correlation=torch.corrcoef(torch.stack(centred).double())[0, 1].item(),
    )


@dataclass(frozen=True)
class Judge:
    """A way to score candidates and to keep pairs."""

    decoder: nn.Module
    scorer: Scorer
    pairs: PairSettings
    decode_batch_size: int

    def judge(self, candidates: Candidates, prompts: Sequence[str], features: Tensor) -> Judged:
        """Judges one comparison of each of B prompts; RunError if a score is not finite."""
        decoding = partial(decode, self.decoder)
        size = self.decode_batch_size
        scores = score_candidates(candidates, decoding, self.scorer, features, size)
        chosen = choose(scores, self.pairs, torch.Generator().manual_seed(0))
        gaps = chosen.gap(scores)
        check_scores([Comparison(candidates.score_timestep, scores, gaps)], prompts)
        return Judged(
            torch.full((len(chosen.prompts),), candidates.score_timestep),
            scores.T[chosen.prompts].cpu(),
            torch.stack([chosen.win, chosen.lose], dim=1).cpu(),
            differ_enough(candidates, gaps, self.pairs).cpu(),
        )


@torch.no_grad()
def judge_rollout(
    model: Backbone,
    sampler: DDIM,
    settings: CollectSettings,
    judges: Sequence[Judge],
    prompts: Sequence[str],
    generator: torch.Generator,
) -> list[Judged]:
    """Rolls out B prompts once with the UNet as it is, and returns the verdicts of each judge."""
    conditioning = model.encode_prompts(prompts)
    features = [judge.scorer.encode_prompts(prompts) for judge in judges]
    steps = [
        [j.judge(candidates, prompts, known) for j, known in zip(judges, features, strict=True)]
        for candidates in roll_out(model, sampler, settings, conditioning, generator)
    ]
    return [concatenate(of_judge) for of_judge in zip(*steps, strict=True)]


def concatenate(parts: Sequence[Judged]) -> Judged:
    """Returns all comparisons of `parts` (at least one), in order."""
    names = [field.name for field in fields(Judged)]
    return Judged(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def check_judges(configs: Sequence[ConfigDict]) -> list[Recipe]:
    """Returns the recipes; UserError if a config is wrong, or draws other candidates than the first."""
    first, recipes = leaves(configs[0]), []
    for config in configs:
        for key, value in leaves(config).items():
            of_judge = key in _JUDGE or key.startswith("preference.")
            if not of_judge and value != first.get(key):
                raise UserError(
                    f"--compare: {key} changes the rollout itself; what can be compared are "
                    f"{', '.join(_JUDGE)} and the keys of preference."
                )
        recipe = read_recipe(config)
        check_source(recipe.model, recipe.run.family)
        check_scorer(recipe.scorer)
        recipes.append(recipe)
    return recipes


def load_judges(model: Backbone, recipes: Sequence[Recipe]) -> list[Judge]:
    """Returns the judge of each recipe; `model` is the base model of the first.

    A decoder or scorer that several recipes have is loaded once.
    """
    decoders, loaded = {None: model.vae, recipes[0].model.decoder: model.decoder}, []
    judges = []
    for recipe in recipes:
        name, source = recipe.model.decoder, recipe.scorer
        if name not in decoders:
            decoders[name] = load_decoder(name, model.dtype).to(model.device)
        scorer = next((scorer for known, scorer in loaded if known == source), None)
        if scorer is None:
            scorer = load_scorer(source, model.device)
            loaded.append((source, scorer))
        collect = recipe.collect
        judges.append(Judge(decoders[name], scorer, collect.pairs, collect.decode_batch_size))
    return judges


def compare_judges(configs: Mapping[str, ConfigDict], rollouts: int) -> dict:
    """Lets every config judge the first `rollouts` of the first config's run.

    Prints a table of the agreement with the first config for each other one, and returns the figures.
    """
    recipes, (config, *_) = check_judges(list(configs.values())), configs.values()
    recipe, plan = recipes[0], plan_batches(config, 1)
    prompts = recipe.prompts.read().prompts
    model = recipe.load_backbone(PartialState().device)
    if recipe.lora.init_from:
        build_lora(recipe, model.unet)
    judges, sampler = load_judges(model, recipes), recipe.load_sampler(model)
    found = []
    slices = first_slices(len(prompts), plan, recipe.run.seed, rollouts)
    for part in tqdm(slices, desc="slices", leave=False):
        rows = [prompts[i] for i in part.prompt_ids]
        found.append(judge_rollout(model, sampler, recipe.collect, judges, rows, part.generator))
    ours, *others = map(concatenate, zip(*found, strict=True))
    figures = {}
    for name, theirs in zip(list(configs)[1:], others, strict=True):
        rows = {"all": agreement(ours, theirs)}
        for t in ours.timesteps.unique().flip(0).tolist():
            at = ours.timesteps == t
            rows[f"t = {t}"] = agreement(ours.select(at), theirs.select(at))
        print(f"{name}\n\n{as_table(rows)}")
        figures[name] = {key: asdict(row) for key, row in rows.items()}
    return figures


def as_table(rows: Mapping[str, Agreement]) -> str:
    """Returns agreements by their names as a Markdown table."""
    head = ["", *(field.name.replace("_", " ") for field in fields(Agreement))]
    cells = [[name, *(f"{value:.3g}" for value in astuple(row))] for name, row in rows.items()]
    return markdown_table(head, cells)
