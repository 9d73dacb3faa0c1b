"""Measures how much a run's pairs depend on the scorer: several judges score the same rollouts."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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
from spo.method.pairs import choose, differ_enough
from spo.models.backbone import Backbone
from spo.models.decoder import decode, load_decoder
from spo.models.loading import check_source
from spo.run.tables import markdown_table
from spo.scorers import Scorer, check_scorer, load_scorer
from spo.types import Candidates, Comparison

# A judge consists of these keys of `sample` and of the section `preference`; all other keys shape the
# rollout.
_JUDGE = ("decoder", "decode_batch_size", "threshold", "keep_all_final", "pairing")


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

    def judge(self, candidates: Candidates, prompts: Sequence[str], features: Tensor) -> Judged:
        """Judges one comparison of each of B prompts; RunError if a score is not finite."""
        size, pairs = self.settings.decode_batch_size, self.settings.pairs
        decoding = partial(decode, self.decoder)
        scores = score_candidates(candidates, decoding, self.scorer, features, size)
        chosen = choose(scores, pairs, torch.Generator().manual_seed(0))
        gaps = chosen.gap(scores)
        check_scores([Comparison(candidates.score_timestep, scores, gaps)], prompts)
        return Judged(
            scores.T[chosen.prompts].cpu(),
            torch.stack([chosen.win, chosen.lose], dim=1).cpu(),
            differ_enough(candidates, gaps, pairs).cpu(),
        )


@torch.no_grad()
def judge_rollout(
    model: Backbone,
    sampler: DDIM,
    settings: CollectSettings,
    judges: Sequence[Judge],
    prompts: Sequence[str],
    generator: torch.Generator,
) -> Iterator[tuple[int, list[Judged]]]:
    """Rolls out B prompts once with the UNet as it is.

    Yields, step by step, the timestep that the scorers are told, and each judge's verdicts.
    """
    conditioning = model.encode_prompts(prompts)
    features = [judge.scorer.encode_prompts(prompts) for judge in judges]
    for candidates in roll_out(model, sampler, settings, conditioning, generator):
        own = zip(judges, features, strict=True)
        verdicts = [judge.judge(candidates, prompts, known) for judge, known in own]
        yield candidates.score_timestep, verdicts


def concatenate(parts: Sequence[Judged]) -> Judged:
    """Returns all comparisons of `parts` (at least one), in order."""
    return Judged(*map(torch.cat, zip(*parts, strict=True)))


def check_judges(configs: Sequence[ConfigDict]) -> list[Recipe]:
    """Returns the recipes; UserError if a config is wrong, or draws other candidates than the first."""
    first, recipes = leaves(configs[0]), []
    keys = [f"sample.{name}" for name in _JUDGE]
    for config in configs:
        for key, value in leaves(config).items():
            of_judge = key in keys or key.startswith("preference.")
            if not of_judge and value != first.get(key):
                raise UserError(
                    f"--compare: {key} changes the rollout itself; what can be compared are "
                    f"{', '.join(keys)} and the keys of preference."
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
    decoders = {None: model.vae, recipes[0].model.decoder: model.decoder}
    scorers: dict[str, Scorer] = {}
    for recipe in recipes:
        name, source = recipe.model.decoder, str(recipe.scorer)
        if name not in decoders:
            decoders[name] = load_decoder(name, model.dtype).to(model.device)
        if source not in scorers:
            scorers[source] = load_scorer(recipe.scorer, model.device)
    return [Judge(decoders[r.model.decoder], scorers[str(r.scorer)], r.collect) for r in recipes]


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
    slices, found = first_slices(len(prompts), plan, recipe.run.seed, rollouts), defaultdict(list)
    for part in tqdm(slices, desc="slices", leave=False):
        rows = [prompts[i] for i in part.prompt_ids]
        steps = judge_rollout(model, sampler, recipe.collect, judges, rows, part.generator)
        for timestep, verdicts in steps:
            for key in ("all", f"t = {timestep}"):
                found[key].append(verdicts)
    figures = {}
    for index, name in enumerate(list(configs)[1:], start=1):
        rows = {}
        for key, verdicts in found.items():
            ours, theirs = (concatenate([step[i] for step in verdicts]) for i in (0, index))
            rows[key] = agreement(ours, theirs)
        head = ["", *(column.replace("_", " ") for column in rows["all"])]
        cells = [[key, *(f"{v:.3g}" for v in row.values())] for key, row in rows.items()]
        print(f"{name}\n\n{markdown_table(head, cells)}\n")
        figures[name] = rows
    return figures
