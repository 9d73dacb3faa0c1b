"""The report of an evaluation that one can look at: report.html, one file that needs no other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spo.evaluation import page
from spo.evaluation.figures import colour, to_svg
from spo.evaluation.plots import plot_differences, plot_means, plot_win_rates
from spo.evaluation.results import Comparison, Results, ScorerInfo, compare
from spo.evaluation.statistics import Estimate
from spo.run.folder import REPORT

_THUMBNAIL = (256, 256)  # pixels


def write_report(folder: Path, results: Results, max_prompts: int = 500) -> Path:
    """Write report.html into `folder`: the comparison, figures, and images side by side.

    Shows the images of at most `max_prompts` prompts, see `chosen_prompts`; table and figures are
    always of all. Raises UserError where an image cannot be read.
    """
    shown = chosen_prompts(results, max_prompts)
    comparisons = [list(rows) for _, rows in groupby(compare(results), lambda row: row.scorer)]
    models = ", ".join(model.name for model in results.models)
    sections = [
        page.header(results.title, [f"{len(results.prompts)} prompts. Models: {models}."]),
        page.section("Comparison", _explanation(results), _table(results, comparisons)),
        page.section("Figures", _legend(results), *(_figures(results, c) for c in comparisons)),
        page.section("Images", _note(results, shown), _gallery(folder, results, shown)),
        page.section("How it was made", *_settings(results)),
    ]
    return page.write_page(folder / REPORT, results.title, sections, script="report.js")


def chosen_prompts(results: Results, max_prompts: int) -> list[int]:
    """Indices of the prompts whose images are shown, in their order: all, if these are few enough.

    Else every model by every scorer takes turns, first with its largest gain over the first model,
    then its largest loss, then the next ones, until `max_prompts` are found.
    """
    rankings = []
    for scorer in results.scorers:
        for gains in _gains(results, scorer):
            rankings += [np.argsort(-gains, kind="stable"), np.argsort(gains, kind="stable")]
    in_turn = dict.fromkeys(np.stack(rankings, axis=1).flatten().tolist())
    return sorted(islice(in_turn, max_prompts))


def _gains(results: Results, scorer: ScorerInfo) -> list[np.ndarray]:
    """Differences (n,) of each other model to the first; of a single model, its scores."""
    first, *others = (np.asarray(model.scores[scorer.name]) for model in results.models)
    return [other - first for other in others] or [first]


def _explanation(results: Results) -> str:
    text = "Brackets hold 95 % bootstrap intervals. The highest mean of each scorer is in bold."
    if len(results.models) > 1:
        text += (
            f" Difference and win rate are to {results.models[0].name}, prompt by prompt; a tie is "
            "half a win. ▲ better and ▼ worse: the interval of the difference leaves out 0."
        )
    return page.paragraph(text)


def _table(results: Results, comparisons: Sequence[Sequence[Comparison]]) -> str:
    heads = ["<th>Scorer</th><th>Model</th>", '<th colspan="2">Mean</th>']
    if len(results.models) > 1:
        first = escape(results.models[0].name)
        heads += [f'<th colspan="3">Difference to {first}</th>', '<th colspan="2">Win rate, %</th>']
        heads.append('<th class="number">Ties</th>')
    heads.append('<th class="number">n</th>')
    bodies = "".join(_table_body(rows) for rows in comparisons)
    return (
        f'<div class="wide"><table class="comparison">\n<thead><tr>{"".join(heads)}</tr></thead>\n'
        f"{bodies}</table></div>\n"
    )


def _table_body(rows: Sequence[Comparison]) -> str:
    """The rows of one scorer."""
    title = f'<th scope="rowgroup" rowspan="{len(rows)}">{escape(_titled(rows[0].scorer))}</th>'
    best = max(row.mean.mean for row in rows)
    all_alike = all(row.mean.mean == best for row in rows)
    lines = []
    for place, row in enumerate(rows):
        bold = row.mean.mean == best and not all_alike
        cells = [title if place == 0 else "", f'<th scope="row">{_swatch(place)}']
        cells += [escape(row.model), "</th>", _estimate(row.mean, ".3f", bold)]
        if row.difference is not None:
            cells += [_estimate(row.difference, "+.3f"), f"<td>{_verdict(row.difference)}</td>"]
            percent = Estimate(*(100 * x for x in vars(row.win_rate).values()))
            cells += [_estimate(percent, ".0f"), f'<td class="number">{row.ties}</td>']
        elif len(rows) > 1:
            cells.append('<td colspan="6"></td>')
        cells.append(f'<td class="number">{row.n}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f"<tbody>\n{''.join(lines)}</tbody>\n"


def _estimate(estimate: Estimate, form: str, bold: bool = False) -> str:
    """Two cells: the mean, and its interval."""
    mean, low, high = (
        f"{x:{form}}".replace("-", "\N{MINUS SIGN}")
        for x in (estimate.mean, estimate.low, estimate.high)
    )
    mean = f"<strong>{mean}</strong>" if bold else mean
    return f'<td class="number">{mean}</td><td class="interval">[{low}, {high}]</td>'


def _verdict(difference: Estimate) -> str:
    if difference.low > 0:
        return '<span class="gain">▲ better</span>'
    return '<span class="loss">▼ worse</span>' if difference.high < 0 else ""


def _titled(scorer: ScorerInfo) -> str:
    return scorer.title + (f" × {scorer.scale:g}" if scorer.scale != 1 else "")


def _swatch(place: int) -> str:
    return f'<i class="swatch" style="background: {colour(place)}"></i>'


def _legend(results: Results) -> str:
    names = (
        f"<li>{_swatch(place)}{escape(model.name)}</li>"
        for place, model in enumerate(results.models)
    )
    text = "Means are points on an axis that does not start at 0; lines are 95 % intervals."
    if len(results.models) > 1:
        text += (
            f" Win rates and differences are to {results.models[0].name}; a dotted line is the mean "
            "of the differences."
        )
    return f'<ul class="legend">{"".join(names)}</ul>\n{page.paragraph(text)}'


def _figures(results: Results, rows: Sequence[Comparison]) -> str:
    """The panels of one scorer."""
    scorer = rows[0].scorer
    figures = {"means": plot_means(rows)}
    if len(rows) > 1:
        figures["wins"] = plot_win_rates(rows)
        figures["differences"] = plot_differences(_gains(results, scorer))
    svgs = (to_svg(figure, f"{name} {scorer.name}") for name, figure in figures.items())
    return f"<h3>{escape(_titled(scorer))}</h3>\n{page.panels(svgs)}"


def _note(results: Results, shown: Sequence[int]) -> str:
    if len(shown) == len(results.prompts):
        return ""
    return page.paragraph(
        f"Shown are {len(shown)} of {len(results.prompts)} prompts, those with the largest gains "
        "and losses of each model by each scorer; table and figures are of all."
    )


def _gallery(folder: Path, results: Results, shown: Sequence[int]) -> str:
    """The place of the cards, and what the script makes them of."""
    images = [
        [page.embedded_image(folder / model.files[i], _THUMBNAIL) for model in results.models]
        for i in tqdm(shown, desc="report", leave=False)
    ]
    data = {
        "pixelated": page.PIXELATED,
        "scorers": [{"name": s.name, "title": s.title} for s in results.scorers],
        "models": [
            {"name": model.name, "colour": colour(place)}
            for place, model in enumerate(results.models)
        ],
        "prompts": [
            {
                "number": i + 1,
                "prompt": results.prompts[i],
                # As text: numbers of 63 bits are rounded in JavaScript.
                "seed": None if results.seeds[i] is None else str(results.seeds[i]),
                "images": row,
                "scores": [[m.scores[s.name][i] for s in results.scorers] for m in results.models],
            }
            for i, row in zip(shown, images, strict=True)
        ],
    }
    return (
        '<div id="gallery"><noscript><p>The images need JavaScript.</p></noscript></div>\n'
        + page.data_block("data", data)
    )


def _settings(results: Results) -> list[str]:
    specs = {model.name: model.spec for model in results.models}
    parts = {"Models": specs, "Settings": results.settings, "Versions": results.versions}
    return [page.details(name, page.facts(values)) for name, values in parts.items()]
