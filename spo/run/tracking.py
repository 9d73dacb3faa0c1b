"""Writes the numbers and pictures of a run to its directory, and to the tracker of the config."""

import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL import Image
from requests.utils import get_netrc_auth
from tqdm import tqdm

from spo.atomic import append_line, writing
from spo.command_line.values import Checked, choice
from spo.errors import UserError, first_line
from spo.run.folder import METRICS
from spo.run.pictures import write_png

TRACKERS = ("wandb", "tensorboard", "none")


@dataclass(frozen=True)
class TrackerSettings(Checked, section="tracker"):
    """The tracker that gets metrics, too; `config.tracker` explains each.

    Raises UserError unless the tracker is known and installed.
    """

    name: str = choice(*TRACKERS)
    project: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name == "tensorboard" and find_spec("tensorboard") is None:
            raise UserError('tracker.name: needs tensorboard; pip install "spo[tensorboard]"')


def has_wandb_key() -> bool:
    """Returns whether wandb will find an API key: in WANDB_API_KEY, or where `wandb login` puts it."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(host))


def _make_tracker(name: str, project: str, run_dir: Path) -> GeneralTracker | None:
    if name == "none":
        return None
    if name == "tensorboard":
        return TensorBoardTracker(project, logging_dir=run_dir)
    mode = os.environ.get("WANDB_MODE")
    if not (mode or has_wandb_key()):
        mode = "offline"
        print(f"wandb: offline, no API key is set; later: wandb sync {run_dir}/wandb/offline-*")
    return WandBTracker(project, name=run_dir.name, dir=str(run_dir), mode=mode)


class Tracking:
    """Metrics and pictures of a run; used on the main process only.

    Raises RunError if the run directory does not take them. A tracker that fails is warned of once,
    and no longer used.
    """

    def __init__(self, run_dir: Path, tracker: str, project: str, config: dict[str, Any]) -> None:
        self._run_dir = run_dir
        self._tracker = _make_tracker(tracker, project, run_dir)
        self._tell("start")
        self._tell("store_init_configuration", _flat(config))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Appends a line to metrics.jsonl and tells the tracker."""
        path = self._run_dir / METRICS
        with writing(path):
            append_line(path, json.dumps(metrics))
        self._tell("log", _flat(metrics), step=step)

    def picture(self, name: str, image: Image.Image, step: int) -> Path:
        """Saves a picture as `name`.png in the run directory and sends it to the tracker."""
        path = self._run_dir / f"{name}.png"
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            write_png(path, image)
        images, options = [image], {}
        if isinstance(self._tracker, TensorBoardTracker):
            images, options = np.asarray(image)[None], {"dataformats": "NHWC"}
        self._tell("log_images", {path.parent.name: images}, step=step, **options)
        return path

    def close(self) -> None:
        """Finishes the tracker's run."""
        self._tell("finish")

    def _tell(self, method: str, *arguments: Any, **options: Any) -> None:
        """Calls a method of the tracker, if there is one that works."""
        try:
            if self._tracker is not None:
                getattr(self._tracker, method)(*arguments, **options)
        except Exception as error:  # whatever the tracker's network, service and files raise
            self._tracker = None
            tqdm.write(
                f"tracker: it failed ({type(error).__name__}: {first_line(error)}); going on "
                f"without it, {self._run_dir / METRICS} has every number"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, keys joined by "/", with only values that every tracker takes."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value if isinstance(value, int | float) else str(value)
    return flat
