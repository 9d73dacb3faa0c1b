"""What the long jobs share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from spo.command_line.config_files import save_config
from spo.errors import UserError
from spo.run.checkpoint_folder import set_aside
from spo.run.folder import CONFIG


def open_run_dir(run_dir: Path, config: ConfigDict, damaged: Iterable[Path] = ()) -> None:
    """Make the directory, save the resolved config in it, put `damaged` checkpoints out of the way.

    UserError where it can't be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, run_dir / CONFIG)
        set_aside(damaged)
    except OSError as error:
        raise UserError(f"logdir: cannot write to {run_dir} ({error.strerror}).") from error
