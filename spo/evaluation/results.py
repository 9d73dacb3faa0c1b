"""The results of an evaluation: every score, and the comparison with the first model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from spo.atomic import write_json
from spo.errors import UserError
from spo.evaluation.statistics import Estimate, bootstrap_mean, paired_difference, win_rate
from spo.run.folder import RESULTS
from spo.run.tables import markdown_table


@dataclass(frozen=True)
class ScorerInfo:
    """A scorer of an evaluation."""

    name: str  # as in the config
    title: str  # as papers call it
    scale: float  # factor of the scores that are stored and printed, as in papers

    @property
    def label(self) -> str:
        """Returns the title with the scale, for figures and pages."""
        return self.title + (f" × {self.scale:g}" if self.scale != 1 else "")


@dataclass(frozen=True)
class ModelInfo:
    """A model of an evaluation."""

    name: str
    spec: str  # as the user wrote it, e.g. "runs/NAME"
    trained_on: Sequence[str] = ()  # sources of its training prompts, as far as known
    unknown_training: bool = False  # not all of them are known
    lora: str = ""  # e.g. "runs/NAME", at any strength
    strength: float | None = None  # of `lora`; 0: the base model itself; None: another model


@dataclass(frozen=True)
class ScoredImage:
    """The image that a model made of a prompt."""

    file: str  # relative to the evaluation's folder
    scores: Mapping[str, float]  # by scorer


@dataclass(frozen=True)
class PromptResult:
    """The images that all models made of a prompt."""

    prompt: str
    seed: int | None  # None if all images came as files
    images: Mapping[str, ScoredImage]  # by model
    seen: Sequence[str] = ()  # the models that were trained on it, as far as known


@dataclass(frozen=True)
class Results:
    """Scores of images that several models made of the same prompts from the same seeds."""

    title: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    scorers: tuple[ScorerInfo, ...]
    models: tuple[ModelInfo, ...]  # each is compared with the first
    prompts: tuple[PromptResult, ...]

    def scores(self, model: ModelInfo, scorer: ScorerInfo) -> tuple[float, ...]:
        """Returns the scores of a model's images, in the order of the prompts."""
        return tuple(row.images[model.name].scores[scorer.name] for row in self.prompts)

    def strengths(self) -> dict[str, dict[float, ModelInfo]]:
        """Returns, for each LoRA at three or more strengths, its models by strength, 0 the base."""
        base = {m.strength: m for m in self.models if not m.lora and m.strength == 0}
        found = {}
        for lora in dict.fromkeys(model.lora for model in self.models if model.lora):
            own = {model.strength: model for model in self.models if model.lora == lora}
            if len(own) >= 3:
                found[lora] = dict(sorted((own | base).items()))
        return found

    def parts(self) -> dict[str, "Results"]:
        """Returns all prompts and, if any model has seen any, those unseen and those seen."""
        unseen = "unknown" if any(model.unknown_training for model in self.models) else "unseen"
        parts = {unseen: [], "seen": []}
        for row in self.prompts:
            parts["seen" if row.seen else unseen].append(row)
        apart = {name: replace(self, prompts=tuple(rows)) for name, rows in parts.items() if rows}
        return {"all": self} | (apart if parts["seen"] else {})

    def training_notes(self) -> list[str]:
        """Returns a line on the prompts that were trained on, and one on the unknown ones."""
        lines, known = [], [model for model in self.models if model.trained_on]
        unknown = [model.name for model in self.models if model.unknown_training]
        if known:
            seen = sum(bool(row.seen) for row in self.prompts)
            by = [
                f"{sum(model.name in row.seen for row in self.prompts)} by {model.name} "
                f"({' + '.join(model.trained_on)})"
                for model in known
            ]
            count = f"{'At least ' if unknown else ''}{seen} of {len(self.prompts)} prompts"
            lines.append(f"{count} were trained on, word for word: {', '.join(by)}.")
        if unknown:
            lines.append(
                f"Training prompts that could not be read: those of {', '.join(unknown)}; which of "
                "these prompts were among them is unknown."
            )
        return lines


@dataclass(frozen=True)
class SummaryRow:
    """One model by one scorer, on its own and beside the first model."""

    scorer: ScorerInfo
    model: str
    mean: Estimate
    difference: Estimate | None  # to the first model, paired by prompt; None for that model itself
    win_rate: Estimate | None  # share of prompts with a higher score; a tie counts half
    ties: int | None
    n: int
    prompts: str  # "all", "unseen" in training ("unknown" if a model's are not known), or "seen"


def summarize(results: Results) -> list[SummaryRow]:
    """Returns a row for every model by every scorer on each part of the prompts, in their order."""
    rows, parts = [], results.parts().items()
    for scorer, (prompts, part), model in product(results.scorers, parts, results.models):
        first, scores = (part.scores(each, scorer) for each in (results.models[0], model))
        paired = (None, None, None)
        if model is not results.models[0]:
            ties = sum(a == b for a, b in zip(first, scores, strict=True))
            paired = (paired_difference(first, scores), win_rate(first, scores), ties)
        mean = bootstrap_mean(scores)
        rows.append(SummaryRow(scorer, model.name, mean, *paired, len(scores), prompts))
    return rows


def summary_table(results: Results) -> str:
    """Returns the comparison in Markdown: a table with intervals of 95 % in brackets, and notes."""
    first, rows = results.models[0].name, summarize(results)
    header = ("scorer", "model", "mean", f"difference to {first}", "win rate", "ties", "n")
    cells = [_cells(row) for row in rows]
    if any(row.prompts != "all" for row in rows):
        header = ("scorer", "prompts", *header[1:])
        cells = [(c[0], row.prompts, *c[1:]) for c, row in zip(cells, rows, strict=True)]
    return "\n\n".join([markdown_table(header, cells), *results.training_notes()])


def _cells(row: SummaryRow) -> tuple[object, ...]:
    title = row.scorer.title + (f" x {row.scorer.scale:g}" if row.scorer.scale != 1 else "")
    paired = ("", "", "")
    if row.difference is not None:
        paired = (f"{row.difference:+.3f}", row.win_rate.percent(), row.ties)
    return title, row.model, f"{row.mean:.3f}", *paired, row.n


def write_results(results: Results, folder: Path) -> Path:
    """Writes results.json: settings, versions, the comparison, and each model's image per prompt."""
    summary = [asdict(row) | {"scorer": row.scorer.name} for row in summarize(results)]
    path = folder / RESULTS
    write_json(path, asdict(results) | {"summary": summary})
    return path


def read_results(folder: Path) -> Results:
    """Returns the inverse of `write_results`; raises UserError if there is no such file of ours."""
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text())
        del content["summary"]
        content["scorers"] = tuple(ScorerInfo(**scorer) for scorer in content["scorers"])
        content["models"] = tuple(ModelInfo(**model) for model in content["models"])
        for row in content["prompts"]:
            row["images"] = {name: ScoredImage(**each) for name, each in row["images"].items()}
        content["prompts"] = tuple(PromptResult(**row) for row in content["prompts"])
        return Results(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the results.json of an evaluation: {error!r}") from error
