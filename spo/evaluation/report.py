"""Writes report.html of an evaluation: one file to look at, which needs no other."""

from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from spo.evaluation import page
from spo.evaluation.figures import INK, colour, panel_axes, style, to_svg
from spo.evaluation.results import ModelInfo, Results, ScorerInfo, SummaryRow, summarize
from spo.evaluation.statistics import Estimate, percent
from spo.hub import public_name
from spo.run.folder import REPORT

_THUMBNAIL = (256, 256)  # pixels
_BINS = 25  # odd: the middle one is centred at no difference


def write_report(folder: Path, results: Results, max_prompts: int = 500) -> Path:
    """Writes report.html: figures of all prompts, images of `max_prompts`; UserError if unreadable."""
    shown = chosen_prompts(results, max_prompts)
    parts = groupby(summarize(results), lambda row: (row.scorer, row.prompts))
    groups = [list(rows) for _, rows in parts]
    whole = [rows for rows in groups if rows[0].prompts == "all"]
    return page.write_page(
        folder / REPORT,
        "report.html.j2",
        title=results.title,
        results=results,
        groups=groups,
        figures=[(rows[0].scorer, _figures(results, rows)) for rows in whole],
        strengths=[
            (public_name(lora), _strengths(lora, at, whole))
            for lora, at in results.strengths().items()
        ],
        percent=percent,
        gallery=_gallery(folder, results, shown),
        specs={model.name: model.spec for model in results.models},
        colour=colour,
    )


def chosen_prompts(results: Results, max_prompts: int) -> list[int]:
    """Returns the sorted indices of the prompts whose images are shown: all, if few enough.

    Otherwise every model by every scorer takes turns, first with its largest gain over the first
    model, then its largest loss, then the next ones, until `max_prompts` are found.
    """
    gains = np.concatenate([_gains(results, scorer) for scorer in results.scorers])
    # By model and scorer: the ranking of the gains, then that of the losses.
    rankings = np.stack([-gains, gains], axis=1).argsort(axis=-1, kind="stable")
    in_turn = dict.fromkeys(rankings.reshape(-1, gains.shape[1]).T.flatten().tolist())
    return sorted(islice(in_turn, max_prompts))


def _gains(results: Results, scorer: ScorerInfo) -> np.ndarray:
    """Returns the differences (m, n) of m other models to the first; for one model, its scores."""
    scores = np.array([results.scores(model, scorer) for model in results.models])
    return scores[1:] - scores[0] if len(scores) > 1 else scores


def _figures(results: Results, rows: Sequence[SummaryRow]) -> list[str]:
    scorer = rows[0].scorer
    figures = {"means": _plot_estimates("Mean", rows, "mean")}
    if len(rows) > 1:
        figures["wins"] = _plot_estimates("Win rate", rows, "win_rate", right=1.0)
        figures["differences"] = _plot_differences(_gains(results, scorer))
    return [to_svg(figure, f"{name} {scorer.name}") for name, figure in figures.items()]


def _plot_estimates(title: str, rows: Sequence[SummaryRow], key: str, right: float = 0) -> Figure:
    """Plots estimates with intervals; `right` ends an axis from 0 with a line in the middle."""
    with style():
        figure, axes = panel_axes(len(rows))
        for place, row in enumerate(rows):
            if (estimate := getattr(row, key)) is not None:
                axes.plot([estimate.low, estimate.high], [place, place], color=colour(place))
                axes.plot(estimate.mean, place, "o", color=colour(place))
        if right:
            axes.axvline(right / 2, color=INK, linewidth=1, linestyle="--")
            axes.set_xlim(0, right)
        axes.set_title(title)
        names = [row.model if len(row.model) <= 18 else f"{row.model[:17]}…" for row in rows]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
    return figure


def _plot_differences(differences: np.ndarray) -> Figure:
    """Plots the distributions of the paired differences (m, n) of m models to the first."""
    with style():
        figure, axes = panel_axes(len(differences) + 1)
        reach = np.abs(differences).max() or 1.0
        bins = {"bins": _BINS, "range": (-reach, reach), "histtype": "stepfilled"}
        for place, each in enumerate(differences, start=1):
            axes.hist(each, **bins, fc=(colour(place), 0.15), ec=colour(place))
            axes.axvline(each.mean(), color=colour(place), linewidth=1.3, linestyle=":")
        axes.axvline(0, color=INK, linewidth=1, linestyle="--")
        axes.set_title("Difference: number of prompts")
    return figure


def _strengths(
    lora: str, at: Mapping[float, ModelInfo], groups: Sequence[Sequence[SummaryRow]]
) -> list[tuple[ScorerInfo, list[float], str]]:
    """Returns each scorer, the strengths of `lora` with its largest mean, and a panel."""
    found = []
    for group in groups:
        by_model = {row.model: row for row in group}
        rows = {strength: by_model[model.name] for strength, model in at.items()}
        largest = max(row.mean.mean for row in rows.values())
        best = [strength for strength, row in rows.items() if row.mean.mean == largest]
        name = f"strengths {lora} {group[0].scorer.name}"
        found.append((group[0].scorer, best, to_svg(_plot_strengths(rows), name)))
    return found


def _plot_strengths(rows: Mapping[float, SummaryRow]) -> Figure:
    """Plots the difference to the first model, with its interval, over the strength."""
    # The first model itself has no difference.
    estimates = [row.difference or Estimate(0, 0, 0) for row in rows.values()]
    with style():
        figure, axes = panel_axes()
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(list(rows), low, high, color=colour(1), alpha=0.2, linewidth=0)
        axes.plot(list(rows), [e.mean for e in estimates], "o-", color=colour(1))
        axes.axhline(0, color=INK, linewidth=1, linestyle="--")
        axes.set_xticks(list(rows), [f"{strength:g}" for strength in rows])
        axes.set_title(next(iter(rows.values())).scorer.label)
        axes.set_xlabel("Strength")
    return figure


def _gallery(folder: Path, results: Results, shown: Sequence[int]) -> dict[str, Any]:
    names, prompts = [model.name for model in results.models], []
    for i in tqdm(shown, desc="report", leave=False):
        row = results.prompts[i]
        images = [row.images[name] for name in names]
        card = {
            "number": i + 1,
            "prompt": row.prompt,
            # As text: numbers of 63 bits are rounded in JavaScript.
            "seed": None if row.seed is None else str(row.seed),
            "seen": ", ".join(row.seen),
            "images": [page.embedded_image(folder / each.file, _THUMBNAIL) for each in images],
            "scores": [[each.scores[s.name] for s in results.scorers] for each in images],
        }
        prompts.append(card)
    return {
        "pixelated": page.PIXELATED,
        "scorers": [{"name": s.name, "title": s.title} for s in results.scorers],
        "models": [{"name": name, "colour": colour(i)} for i, name in enumerate(names)],
        "prompts": prompts,
    }
