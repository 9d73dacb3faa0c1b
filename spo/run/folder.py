"""The directory that holds everything a run did."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from spo.atomic import whole_lines, write_lines, writing
from spo.errors import UserError

# The files and folders of a run, and of an evaluation.
CONFIG = "config.json"
STARTS = "starts.jsonl"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SAMPLES, SAMPLES_INDEX = "samples", "samples.json"  # the newest validation images one by one
SPM_FILE = "step_aware_preference_model.safetensors"
REPORT, RESULTS, TABLE = "report.html", "results.json", "table.md"


_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def run_folder(logdir: str, run_name: str, method: str, family: str) -> Path:
    """Returns the run directory: `run_name` in `logdir`, by default method, family and start time."""
    default = f"{method}_{family}_{time.strftime('%Y%m%d_%H%M%S')}"
    return Path(logdir).expanduser() / (run_name or default)


def versions() -> dict[str, str]:
    """Those of Python and of the libraries that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def record_start(run_dir: Path, facts: dict) -> None:
    """Add to starts.jsonl how the run was started: command, versions, and `facts`."""
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "versions": versions(),
        **facts,
    }
    path = run_dir / STARTS
    with writing(path):
        write_lines(path, [*whole_lines(path), json.dumps(start)])


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl; UserError where there are none, or where one is damaged."""
    path = run_dir / METRICS
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; name the directory of a training run."
        ) from error
    lines = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # half a line, the last of a run that is writing it or was killed
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
    if not lines:
        raise UserError(f"{path} is empty: the run has not got as far as its first metrics.")
    return lines


def drop_metrics_after(run_dir: Path, last: int, counter: str = "rollout") -> None:
    """Keep the metrics of up to `last` of `counter`: a resumed run writes the others again."""
    path = run_dir / METRICS
    kept = [line for line in whole_lines(path) if _counted(line, counter) <= last]
    if path.exists():
        with writing(path):
            write_lines(path, kept)


def _counted(line: str, counter: str) -> float:
    try:
        return json.loads(line)[counter]
    except ValueError:  # what a machine that stopped may leave behind
        return math.inf
