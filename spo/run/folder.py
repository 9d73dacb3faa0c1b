"""The directory that holds everything a run did."""

import contextlib
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.utils.sha import sha_fileobj

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
    """Returns the versions of Python and of the libraries that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def record_start(run_dir: Path, facts: dict) -> None:
    """Adds to starts.jsonl how the run was started: command, versions, and `facts`."""
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
    """Returns the lines of metrics.jsonl; raises UserError if there is none or one is damaged."""
    path, lines = run_dir / METRICS, []
    try:
        lines += map(json.loads, whole_lines(path))
    except ValueError as error:
        raise UserError(f"{path}, line {len(lines) + 1}: not JSON: {error}") from error
    if not lines:
        raise UserError(f"{path} is missing or empty; name the directory of a training run.")
    return lines


def drop_metrics_after(run_dir: Path, last: int, counter: str = "rollout") -> None:
    """Deletes damaged metrics, and metrics with `counter` past `last`, which a resumed run repeats."""
    path = run_dir / METRICS
    if not path.exists():
        return
    kept = []
    for line in whole_lines(path):
        with contextlib.suppress(ValueError):  # half a line that a machine that stopped left behind
            kept += [line] if json.loads(line)[counter] <= last else []
    with writing(path):
        write_lines(path, kept)
