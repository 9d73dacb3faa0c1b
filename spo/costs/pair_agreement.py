"""Measures how much a run's pairs depend on the scorer: several judges score the same rollouts."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from ml_collections import ConfigDict
from torch import Generator, Tensor, nn
from tqdm import tqdm

from spo.command_line.config_files import leaves
from spo.errors import UserError
from spo.launch.batch_plan import plan_batches
from spo.method.build import Recipe, build_lora
from spo.method.collect import CollectSettings, first_slices, roll_out, score_candidates
from spo.method.health import check_scores
from spo.method.pairs import choose, differ_enough
from spo.models.backbone import Backbone
from spo.models.decoder import decode, load_decoder
from spo.models.device import set_up_device
from spo.models.gpu import pick_device
from spo.models.loading import check_source
from spo.run.tables import markdown_table
from spo.scorers import Scorer, check_scorer, load_scorer
from spo.types import Candidates, Comparison

# A judge consists of these keys of `sample` and of the section `preference`; all other keys shape the
# rollout.
_JUDGE = (
    *("decoder", "decode_batch_size", "score_batch_size", "score_timestep", "pairing"),
    *("threshold", "threshold_schedule", "threshold_min", "threshold_max", "keep_all_final"),
)


class Judged(NamedTuple):
    """The verdicts of one judge on n comparisons of K candidates."""

    scores: Tensor  # (n, K)
    chosen: Tensor  # (n, 2) int64, the best and the worst candidate
    kept: Tensor  # (n,) bool: best and worst make a pair


def agreement(one: Judged, other: Judged) -> dict[str, float]:
    """Returns the agreement of two judges on the same comparisons (at least one); shares are 0 to 1.

    `both_of_pairs` is the share among the pairs that the first judge keeps, NaN without any; `kept` is
    the share that both keep as a pair, or neither does; `correlation` is Pearson's, of the scores less
    their mean over the candidates.
    """
    same = one.chosen == other.chosen  # (n, 2)
    shares = {"best": same[:, 0], "worst": same[:, 1], "both": same.all(dim=1)}
    shares |= {"both_of_pairs": shares["both"][one.kept], "kept": one.kept == other.kept}
    # Prompts and timesteps move all scores of a comparison together, which decides nothing.
    centred = [(j.scores - j.scores.mean(dim=1, keepdim=True)).flatten() for j in (one, other)]
    return {
        "comparisons": len(one.scores),
        **{name: rows.double().mean().item() for name, rows in shares.items()},
        "correlation": torch.corrcoef(torch.stack(centred).double())[0, 1].item(),
    }


@dataclass(frozen=True)
class Judge:
    """A way to score candidates and to keep pairs."""

    decoder: nn.Module
    scorer: Scorer
    settings: CollectSettings

    def judge(self, candidates: Candidates, prompts: Sequence[str]) -> Judged:
        """Judges one comparison of each of B prompts; RunError if a score is not finite."""
        settings, pairs = self.settings, self.settings.pairs
        decoding, features = partial(decode, self.decoder), self.scorer.encode_prompts(prompts)
        scores = score_candidates(candidates, decoding, self.scorer, features, settings)
        chosen = choose(scores, pairs, Generator().manual_seed(0))
        gaps = chosen.gap(scores)
        told = settings.timestep_told(candidates, self.scorer)
        check_scores([Comparison(told, scores, gaps)], prompts)
        return Judged(
            scores.T[chosen.prompts].cpu(),
            torch.stack([chosen.win, chosen.lose], dim=1).cpu(),
            differ_enough(candidates, gaps, pairs).cpu(),
        )


@torch.no_grad()
def judge_rollout(
    model: Backbone,
    recipe: Recipe,
    judges: Sequence[Judge],
    prompts: Sequence[str],
    noise: Generator,
) -> Iterator[tuple[int, list[Judged]]]:
    """Rolls out B prompts once with the UNet as it is.

    Yields, step by step, the timestep that the candidates are drawn from, and each judge's verdicts.
    """
    sampler, conditioning = recipe.load_sampler(model), model.encode_prompts(prompts)
    for candidates in roll_out(model, sampler, recipe.collect, conditioning, noise):
        timestep = candidates.window[0].timestep
        yield timestep, [judge.judge(candidates, prompts) for judge in judges]


def concatenate(parts: Sequence[Judged]) -> Judged:
    """Returns all comparisons of `parts` (at least one), in order."""
    return Judged(*map(torch.cat, zip(*parts, strict=True)))


def check_judges(recipes: Sequence[Recipe]) -> None:
    """Raises UserError if a recipe draws other candidates than the first, or lacks a file."""
    first, *others = (leaves(ConfigDict(recipe.config)) for recipe in recipes)
    keys = [f"sample.{name}" for name in _JUDGE]
    for settings in others:
        for key, value in settings.items():
            of_judge = key in keys or key.startswith("preference.")
            if not of_judge and value != first.get(key):
                raise UserError(
                    f"--compare: {key} changes the rollout itself; what can be compared are "
                    f"{', '.join(keys)} and the keys of preference."
                )
    for recipe in recipes:
        configs = check_source(recipe.model, recipe.run.family)
        check_scorer(recipe.scorer, recipe.run.family, configs)


def load_judges(model: Backbone, recipes: Sequence[Recipe]) -> list[Judge]:
    """Returns the judge of each recipe; `model` is the base model of the first.

    A scorer that several recipes have is loaded once.
    """
    decoders = {None: model.vae, recipes[0].model.decoder: model.decoder}
    scorers, judges = {}, []
    for recipe in recipes:
        name, source = recipe.model.decoder, str(recipe.scorer)
        if name not in decoders:
            decoders[name] = load_decoder(name, model.dtype).to(model.device)
        scorers[source] = scorers.get(source) or load_scorer(recipe.scorer, model.device)
        judges.append(Judge(decoders[name], scorers[source], recipe.collect))
    return judges


def compare_judges(named: Mapping[str, Recipe], rollouts: int) -> dict:
    """Lets every recipe judge the first `rollouts` of the first recipe's run.

    Prints a table of the agreement with the first recipe for each other one, and returns the figures.
    """
    recipe, *_ = recipes = list(named.values())
    check_judges(recipes)
    if any(each.collect.rollout.looks_at == "images" for each in recipes):
        recipe = recipe.drawing_images()
    plan, prompts = plan_batches(recipe.config, 1), recipe.read_prompts().prompts
    device = pick_device()
    set_up_device(device, recipe.run.allow_tf32, recipe.run.deterministic)
    model = recipe.load_backbone(device)
    if recipe.lora.init_from:
        build_lora(recipe, model.unet)
    judges, found = load_judges(model, recipes), defaultdict(list)
    slices = first_slices(len(prompts), plan, recipe.run.seed, rollouts)
    for part in tqdm(slices, desc="slices", leave=False):
        rows = [prompts[i] for i in part.prompt_ids]
        for timestep, verdicts in judge_rollout(model, recipe, judges, rows, part.generator):
            for key in ("all", f"t = {timestep}"):
                found[key].append(verdicts)
    figures = {}
    joined = {k: list(map(concatenate, zip(*v, strict=True))) for k, v in found.items()}
    for index, name in enumerate(list(named)[1:], start=1):
        rows = {key: agreement(judged[0], judged[index]) for key, judged in joined.items()}
        head = ["", *(column.replace("_", " ") for column in rows["all"])]
        cells = [[key, *(f"{v:.3g}" for v in row.values())] for key, row in rows.items()]
        print(f"{name}\n\n{markdown_table(head, cells)}\n")
        figures[name] = rows
    return figures
