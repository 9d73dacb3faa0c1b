"""The report of a training run that one can look at: report.html, one file that needs no other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from spo.errors import UserError
from spo.evaluation import page
from spo.evaluation.curves import draw_panel, panels_of
from spo.evaluation.figures import panel, style, to_svg
from spo.run.folder import CONFIG, REPORT, STARTS, read_metrics

_GRID = (1280, 4096)  # pixels, width and height


def write_run_report(run_dir: Path) -> Path:
    """Write report.html into the directory of a run: curves, validation images, config, starts.

    Raises UserError where the run has no metrics yet, or where a file of it is damaged.
    """
    lines = read_metrics(run_dir)
    config, starts = _read_json(run_dir / CONFIG), _read_starts(run_dir)
    title = run_dir.resolve().name
    sections = [
        page.header(title, [_kind(config)]) + _summary(lines),
        page.section("Curves", page.panels(_curves(lines))),
        _validation(run_dir),
        page.section(
            "How it was made", *_starts(starts), page.details("Config", page.facts(config))
        ),
    ]
    return page.write_page(run_dir / REPORT, title, sections, script="run_report.js")


def _kind(config: Mapping[str, Any]) -> str:
    method = config.get("algorithm", "step-aware preference model")
    return f"{method} on {config['pretrained']['model']}"


def _summary(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the run amounts to so far, as far as its metrics tell."""
    last = lines[-1]
    seconds = sum(line.get("seconds_rollout", 0) + line.get("seconds_train", 0) for line in lines)
    values = {
        "epochs": last.get("epoch"),
        "rollouts": last.get("rollout"),
        "updates": last["step"],
        "skipped updates": sum(line.get("skipped_updates", 0) for line in lines),
        "pairs": sum(line.get("pairs", 0) for line in lines),
        "time": _duration(seconds) if seconds else None,
        "peak memory": f"{max(line.get('peak_memory_gib', 0) for line in lines):.1f} GiB",
    }
    items = (
        f"<div><dt>{name}</dt><dd>{f'{value:,}' if isinstance(value, int) else value}</dd></div>\n"
        for name, value in values.items()
        if value is not None
    )
    return f'<dl class="summary">\n{"".join(items)}</dl>\n'


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    svgs = []
    for each in panels_of(lines):
        with style():
            figure, axes = panel()
            draw_panel(axes, lines, each)
        svgs.append(to_svg(figure, each.title))
    return svgs


def _validation(run_dir: Path) -> str:
    """The grids of validation images, one behind the other; nothing where there are none."""
    files = sorted((run_dir / "validation").glob("*.png"))
    if not files:
        return ""
    slides = (
        f'<figure><img src="{page.embedded_image(file, _GRID)}" alt="{escape(file.stem)}">'
        f"<figcaption>{escape(file.stem.replace('_', ' '))}</figcaption></figure>\n"
        for file in files
    )
    return page.section("Validation images", f'<div class="slides">\n{"".join(slides)}</div>\n')


def _starts(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        page.details(
            f"Started {start['time']}",
            page.facts(start | {"command": shlex.join(start["command"])}),
        )
        for start in starts
    ]


def _read_starts(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / STARTS
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: a line is not JSON: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the config of a run: {error}") from error
