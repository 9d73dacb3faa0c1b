"""The directory that holds everything a run did."""

from __future__ import annotations

import json
import time
from pathlib import Path

from ml_collections import ConfigDict

from spo.checkpoint import checkpoints
from spo.config_io import save_config
from spo.errors import UserError
from spo.tracking import METRICS

CONFIG = "config.json"


def run_name(config: ConfigDict) -> str:
    """The name of the run directory: `config.run_name`, or algorithm, family and start time."""
    if config.run_name:
        return config.run_name
    algorithm = config.algorithm.partition(":")[2] or config.algorithm
    return f"{algorithm}_{config.family}_{time.strftime('%Y%m%d_%H%M%S')}"


def find_checkpoint(run_dir: Path, resume_from: str) -> Path | None:
    """The checkpoint to resume from; None to start anew.

    Raises UserError where it is missing, or where a new run would write over an old one.
    """
    if resume_from == "auto":
        found = checkpoints(run_dir)
        return found[-1] if found else None
    if resume_from:
        if not Path(resume_from).is_dir():
            raise UserError(f"resume_from: no checkpoint folder {resume_from!r}.")
        return Path(resume_from)
    if (run_dir / METRICS).exists() or checkpoints(run_dir):
        raise UserError(
            f"run_name: {run_dir} already holds a run; choose another run_name, or go on with it by "
            "resume_from=auto."
        )
    return None


def open_run_dir(run_dir: Path, config: ConfigDict) -> None:
    """Make the directory and save the resolved config in it; UserError where it can't be written."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / CONFIG)
    except OSError as error:
        raise UserError(f"logdir: cannot write to {run_dir} ({error.strerror}).") from error


def drop_metrics_after(run_dir: Path, rollouts: int) -> None:
    """Keep the metrics of the first `rollouts` rollouts: a resumed run writes the others again."""
    path = run_dir / METRICS
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["rollout"] <= rollouts]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
