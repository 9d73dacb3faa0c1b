"""Where the numbers and pictures of a run go: its directory, and the tracker the user chose."""

from __future__ import annotations

import contextlib
import io
import json
import netrc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image
from tqdm import tqdm

from spo.atomic import append_line, write_file, writing
from spo.command_line.values import Checked, choice
from spo.errors import UserError, first_line
from spo.run.folder import METRICS

TRACKERS = ("wandb", "tensorboard", "none")


@dataclass(frozen=True)
class TrackerSettings(Checked, section="tracker"):
    """Where metrics go besides the run directory; `config.tracker` explains each.

    Raises UserError unless the tracker is known and installed.
    """

    name: str = choice(*TRACKERS)
    project: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "tensorboard":
            try:
                import torch.utils.tensorboard  # noqa: F401
            except ImportError as error:
                raise UserError(
                    'tracker.name: tensorboard is not installed; pip install "spo[tensorboard]", '
                    "or tracker.name=none."
                ) from error


def has_wandb_key() -> bool:
    """Whether wandb will find an API key: in WANDB_API_KEY, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_tracker(name: str, project: str, run_dir: Path) -> GeneralTracker:
    if name == "tensorboard":
        tracker = TensorBoardTracker(project, logging_dir=run_dir)
    else:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
        if not (os.environ.get("WANDB_MODE") or mode == "online"):
            print(f"wandb: offline, no API key is set; later: wandb sync {run_dir}/wandb/offline-*")
        tracker = WandBTracker(project, name=run_dir.name, dir=str(run_dir), mode=mode)
    tracker.start()
    return tracker


class Tracking:
    """Metrics and pictures of a run; used on the main process alone.

    The run directory has to take them: RunError where it does not. A tracker that fails is left out
    from then on, with one warning.
    """

    def __init__(self, run_dir: Path, tracker: str, project: str, config: dict[str, Any]) -> None:
        self._run_dir = run_dir
        self._tracker: GeneralTracker | None = None
        if tracker != "none":
            with self._tracker_may_fail():
                self._tracker = _start_tracker(tracker, project, run_dir)
                self._tracker.store_init_configuration(_flat(config))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Append a line to metrics.jsonl and tell the tracker."""
        path = self._run_dir / METRICS
        with writing(path):
            append_line(path, json.dumps(metrics))
        if self._tracker is not None:
            with self._tracker_may_fail():
                self._tracker.log(_flat(metrics), step=step)

    def picture(self, name: str, image: Image.Image, step: int) -> Path:
        """Save a picture as `name`.png in the run directory and show it to the tracker."""
        path = self._run_dir / f"{name}.png"
        with writing(path), io.BytesIO() as png:
            path.parent.mkdir(exist_ok=True)
            image.save(png, "png")
            write_file(path, png.getvalue())
        if self._tracker is not None:
            with self._tracker_may_fail():
                self._show(path.parent.name, image, step)
        return path

    def _show(self, tag: str, image: Image.Image, step: int) -> None:
        if isinstance(self._tracker, TensorBoardTracker):
            pixels = np.asarray(image)[None]
            self._tracker.log_images({tag: pixels}, step=step, dataformats="NHWC")
        else:
            self._tracker.log_images({tag: [image]}, step=step)

    def close(self) -> None:
        """Finish the tracker's run."""
        if self._tracker is not None:
            with self._tracker_may_fail():
                self._tracker.finish()

    @contextlib.contextmanager
    def _tracker_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the tracker's network, service and files raise
            self._tracker = None
            tqdm.write(
                f"tracker: it failed ({type(error).__name__}: {first_line(error)}); going on "
                f"without it, {self._run_dir / METRICS} has every number"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by "/", with only values that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + key] = value
        elif value is not None:
            flat[prefix + key] = str(value)
    return flat
