"""The directory that holds everything a run did."""

from __future__ import annotations

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from ml_collections import ConfigDict

from spo.checkpoint import checkpoints, is_checkpoint
from spo.config_io import save_config
from spo.errors import UserError
from spo.tracking import METRICS

CONFIG = "config.json"
STARTS = "starts.jsonl"
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def run_name(config: ConfigDict, method: str) -> str:
    """The name of the run directory: `config.run_name`, or method, family and start time."""
    if config.run_name:
        return config.run_name
    return f"{method.rpartition(':')[2]}_{config.family}_{time.strftime('%Y%m%d_%H%M%S')}"


def find_checkpoint(config: ConfigDict, run_dir: Path) -> Path | None:
    """The checkpoint to resume from; None to start anew.

    Raises UserError where there is none, and rather than write over what a run has computed.
    """
    own = checkpoints(run_dir)
    if config.resume_from == "auto":
        if not config.run_name:
            raise UserError("resume_from: auto goes on with a run; say which one by run_name.")
        return own[-1] if own else None
    if config.resume_from:
        folder = Path(config.resume_from).expanduser()
        if not is_checkpoint(folder):
            raise UserError(
                f"resume_from: {folder} is not a checkpoint; name a folder of "
                "runs/NAME/checkpoints, or run_name=NAME and resume_from=auto."
            )
        if own and folder.resolve() == own[-1].resolve():
            return folder
        if not (own or (run_dir / METRICS).exists()):
            return folder
        raise UserError(
            f"run_name: {run_dir} already went on from another point than {folder}; choose another "
            "run_name to branch off there, or resume_from=auto."
        )
    if own or (run_dir / METRICS).exists():
        raise UserError(
            f"run_name: {run_dir} already holds a run; choose another run_name, or go on with it "
            "by resume_from=auto."
        )
    return None


def open_run_dir(run_dir: Path, config: ConfigDict) -> None:
    """Make the directory and save the resolved config in it; UserError where it can't be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / CONFIG)
    except OSError as error:
        raise UserError(f"logdir: cannot write to {run_dir} ({error.strerror}).") from error


def record_start(run_dir: Path, facts: dict) -> None:
    """Append to starts.jsonl how the run was started: command, versions, and `facts`."""
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        **facts,
    }
    with (run_dir / STARTS).open("a") as file:
        file.write(json.dumps(start) + "\n")


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
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A run that was killed may have left half a line, which is the last.
        if not line.endswith("\n") or json.loads(line)[counter] > last:
            break
        kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
