"""Writes report.html of a training run: one file to look at, which needs no other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo.errors import UserError
from spo.evaluation import page
from spo.evaluation.curves import draw_panel, panels_of
from spo.evaluation.figures import panel, style, to_svg
from spo.run.folder import CONFIG, REPORT, STARTS, read_metrics

_GRID = (1280, 4096)  # pixels, width and height


def write_run_report(run_dir: Path) -> Path:
    """Writes report.html into the directory of a run: curves, validation images, config, starts.

    Raises UserError if the run has no metrics yet, or if a file of it is damaged.
    """
    lines = read_metrics(run_dir)
    pictures = sorted((run_dir / "validation").glob("*.png"))
    return page.write_page(
        run_dir / REPORT,
        "run_report.html.j2",
        title=run_dir.resolve().name,
        config=_read_config(run_dir / CONFIG),
        starts=_read_starts(run_dir / STARTS),
        totals=_totals(lines),
        curves=_curves(lines),
        slides={picture.stem: page.embedded_image(picture, _GRID) for picture in pictures},
    )


def _totals(lines: Sequence[Mapping[str, Any]]) -> dict[str, int | str | None]:
    """Returns what the run amounts to so far; None for what its metrics do not tell."""
    last = lines[-1]
    seconds = sum(line.get("seconds_rollout", 0) + line.get("seconds_train", 0) for line in lines)
    return {
        "epochs": last.get("epoch"),
        "rollouts": last.get("rollout"),
        "updates": last["step"],
        "skipped updates": sum(line.get("skipped_updates", 0) for line in lines),
        "pairs": sum(line.get("pairs", 0) for line in lines),
        "time": _duration(seconds) if seconds else None,
        "peak memory": f"{max(line.get('peak_memory_gib', 0) for line in lines):.1f} GiB",
    }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a panel of SVG for each metric that `lines` hold."""
    svgs = []
    for each in panels_of(lines):
        with style():
            figure, axes = panel()
            draw_panel(axes, lines, each)
        svgs.append(to_svg(figure, each.title))
    return svgs


def _read_starts(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of starts.jsonl; none if there is no such file."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        starts = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path}: a line is not JSON: {error}") from error
    return [start | {"command": shlex.join(start["command"])} for start in starts]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the config of a run: {error}") from error
