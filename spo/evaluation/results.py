"""The results of an evaluation: every score, and the comparison with the first model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class ModelInfo:
    """A model of an evaluation."""

    name: str
    spec: str  # as the user wrote it, e.g. "runs/NAME"
    files: tuple[str, ...]  # images, one per prompt, relative to the evaluation's folder
    scores: Mapping[str, tuple[float, ...]]  # by scorer, one per prompt


@dataclass(frozen=True)
class Results:
    """Scores of images that several models made of the same prompts from the same seeds."""

    title: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    scorers: tuple[ScorerInfo, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int | None, ...]  # of each prompt's image; None if all images came as files
    models: tuple[ModelInfo, ...]  # each is compared with the first


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


def summarize(results: Results) -> list[SummaryRow]:
    """Returns a row for every model by every scorer, in their order."""
    rows = []
    for scorer in results.scorers:
        first = results.models[0].scores[scorer.name]
        for model in results.models:
            scores = model.scores[scorer.name]
            paired = (None, None, None)
            if model is not results.models[0]:
                ties = sum(int(a == b) for a, b in zip(first, scores, strict=True))
                paired = (paired_difference(first, scores), win_rate(first, scores), ties)
            rows.append(
                SummaryRow(scorer, model.name, bootstrap_mean(scores), *paired, n=len(scores))
            )
    return rows


def summary_table(results: Results) -> str:
    """Returns the comparison as a Markdown table, with intervals of 95 % in brackets."""
    first = results.models[0].name
    header = ("scorer", "model", "mean", f"difference to {first}", "win rate", "ties", "n")
    return markdown_table(header, map(_cells, summarize(results)))


def _cells(row: SummaryRow) -> tuple[object, ...]:
    title = row.scorer.title + (f" x {row.scorer.scale:g}" if row.scorer.scale != 1 else "")
    mean = f"{row.mean.mean:.3f} [{row.mean.low:.3f}, {row.mean.high:.3f}]"
    if row.difference is None:
        return title, row.model, mean, "", "", "", row.n
    gain = row.difference
    difference = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return title, row.model, mean, difference, row.win_rate.percent(), row.ties, row.n


def write_results(results: Results, folder: Path) -> Path:
    """Writes results.json: settings, versions, the comparison, and each model's image per prompt."""
    content = {
        "title": results.title,
        "settings": results.settings,
        "versions": results.versions,
        "scorers": [asdict(scorer) for scorer in results.scorers],
        "models": [{"name": model.name, "spec": model.spec} for model in results.models],
        "summary": [asdict(row) | {"scorer": row.scorer.name} for row in summarize(results)],
        "prompts": [
            {
                "prompt": prompt,
                "seed": seed,
                "images": {
                    model.name: {
                        "file": model.files[i],
                        "scores": {name: scores[i] for name, scores in model.scores.items()},
                    }
                    for model in results.models
                },
            }
            for i, (prompt, seed) in enumerate(zip(results.prompts, results.seeds, strict=True))
        ],
    }
    path = folder / RESULTS
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def read_results(folder: Path) -> Results:
    """Returns the inverse of `write_results`; raises UserError if there is no such file of ours."""
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text())
        scorers = tuple(ScorerInfo(**scorer) for scorer in content["scorers"])
        rows, models = content["prompts"], []
        for model in content["models"]:
            images = [row["images"][model["name"]] for row in rows]
            files = tuple(image["file"] for image in images)
            scores = {s.name: tuple(image["scores"][s.name] for image in images) for s in scorers}
            models.append(ModelInfo(**model, files=files, scores=scores))
        return Results(
            **{name: content[name] for name in ("title", "settings", "versions")},
            scorers=scorers,
            prompts=tuple(row["prompt"] for row in rows),
            seeds=tuple(row["seed"] for row in rows),
            models=tuple(models),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the results.json of an evaluation: {error!r}") from error
