"""Writes report.html of an evaluation: one file to look at, which needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from spo.evaluation import page
from spo.evaluation.figures import colour, to_svg
from spo.evaluation.plots import plot_differences, plot_means, plot_win_rates
from spo.evaluation.results import Results, ScorerInfo, SummaryRow, summarize
from spo.run.folder import REPORT

_THUMBNAIL = (256, 256)  # pixels


def write_report(folder: Path, results: Results, max_prompts: int = 500) -> Path:
    """Writes report.html into `folder`: the comparison, figures, and images side by side.

    Shows the images of at most `max_prompts` prompts, see `chosen_prompts`; table and figures are
    of all prompts. Raises UserError if an image cannot be read.
    """
    shown = chosen_prompts(results, max_prompts)
    groups = [list(rows) for _, rows in groupby(summarize(results), lambda row: row.scorer)]
    return page.write_page(
        folder / REPORT,
        "report.html.j2",
        title=results.title,
        results=results,
        groups=[{"rows": rows, "figures": _figures(results, rows)} for rows in groups],
        shown=len(shown),
        gallery=_gallery(folder, results, shown),
        specs={model.name: model.spec for model in results.models},
        colour=colour,
    )


def chosen_prompts(results: Results, max_prompts: int) -> list[int]:
    """Returns the sorted indices of the prompts whose images are shown: all, if few enough.

    Otherwise every model by every scorer takes turns, first with its largest gain over the first
    model, then its largest loss, then the next ones, until `max_prompts` are found.
    """
    rankings = []
    for scorer in results.scorers:
        for gains in _gains(results, scorer):
            rankings += [np.argsort(-gains, kind="stable"), np.argsort(gains, kind="stable")]
    in_turn = dict.fromkeys(np.stack(rankings, axis=1).flatten().tolist())
    return sorted(islice(in_turn, max_prompts))


def _gains(results: Results, scorer: ScorerInfo) -> list[np.ndarray]:
    """Returns the differences (n,) of each other model to the first; for one model, its scores."""
    first, *others = (np.asarray(model.scores[scorer.name]) for model in results.models)
    return [other - first for other in others] or [first]


def _figures(results: Results, rows: Sequence[SummaryRow]) -> list[str]:
    """Returns the panels of one scorer as SVG."""
    scorer = rows[0].scorer
    figures = {"means": plot_means(rows)}
    if len(rows) > 1:
        figures["wins"] = plot_win_rates(rows)
        figures["differences"] = plot_differences(_gains(results, scorer))
    return [to_svg(figure, f"{name} {scorer.name}") for name, figure in figures.items()]


def _gallery(folder: Path, results: Results, shown: Sequence[int]) -> dict[str, Any]:
    """Returns what report.js makes the cards of."""
    prompts = [
        {
            "number": i + 1,
            "prompt": results.prompts[i],
            # As text: numbers of 63 bits are rounded in JavaScript.
            "seed": None if results.seeds[i] is None else str(results.seeds[i]),
            "images": [
                page.embedded_image(folder / m.files[i], _THUMBNAIL) for m in results.models
            ],
            "scores": [[m.scores[s.name][i] for s in results.scorers] for m in results.models],
        }
        for i in tqdm(shown, desc="report", leave=False)
    ]
    return {
        "pixelated": page.PIXELATED,
        "scorers": [{"name": s.name, "title": s.title} for s in results.scorers],
        "models": [{"name": m.name, "colour": colour(i)} for i, m in enumerate(results.models)],
        "prompts": prompts,
    }
