"""A run directory, or a log of other code with the same method -> the numbers of its rollouts."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spo.atomic import whole_lines
from spo.command_line.config_files import load_config
from spo.command_line.values import fill
from spo.errors import UserError
from spo.run.checkpoint_folder import checkpoints
from spo.run.folder import CONFIG, METRICS, read_metrics

# Our names of numbers, and those that other code may have for them. The official trainers log through
# accelerate to wandb.
_NAMES: dict[str, tuple[str, ...]] = {
    "step": ("_step", "global_step"),
    "epoch": (),
    "loss": ("train_loss", "loss_mean"),
    "win_ratio": ("ratio_win", "ratio_w", "ratio_win_mean", "win_ratio_mean"),
    "lose_ratio": ("ratio_lose", "ratio_l", "ratio_lose_mean", "lose_ratio_mean"),
    "clipped": ("clip_frac", "clipfrac", "clip_fraction"),
    "grad_norm": ("gradient_norm", "total_norm"),
    "score_mean": ("mean_score", "preference_score", "reward_mean", "mean_reward", "reward"),
    "win_margin": ("margin", "score_margin"),
    "pairs": ("num_pairs", "valid_pairs", "num_valid_pairs"),
    "comparisons": ("num_comparisons",),
}
_OURS = {other: name for name, others in _NAMES.items() for other in (name, *others)}
_CHECKED = set(_NAMES) - {"step", "epoch"}


@dataclass(frozen=True)
class Settings:
    """The values of a run's config that its numbers follow from; config/base.py explains each."""

    algorithm: str
    num_inner_steps: int
    threshold: float | None
    threshold_min: float | None
    batch_size: int
    global_batch_size: int | None
    beta: float
    clip_eps: float | None
    learning_rate: float
    max_grad_norm: float | None
    adam_beta1: float
    ema_decay: float


@dataclass(frozen=True)
class Log:
    """What a run has written so far."""

    lines: Sequence[Mapping[str, Any]]  # of its rollouts; of its updates, if of other code
    settings: Settings
    evaluations: Sequence[Mapping[str, Any]] = field(default=())
    has_evaluations: bool = False  # other code has none
    lora_weights: int | None = None  # None: no LoRA is saved yet

    def numbers(self, name: str) -> list[float]:
        """Returns the finite values of a number, in order."""
        found = (line.get(name) for line in self.lines)
        return [float(v) for v in found if isinstance(v, int | float) and math.isfinite(v)]


def open_log(path: Path, config: str | None = None) -> Log:
    """Returns the log of a run directory, or in a .jsonl, .json or .csv file.

    `config` is the file whose values count: by default the run's own, of a file config/sd15.py.
    Raises UserError for what cannot be read, and for the run of a preference model.
    """
    if path.name == METRICS and (path.parent / CONFIG).exists():
        path = path.parent
    if not path.exists():
        raise UserError(f"no run directory or file {path}; name a run, or the numbers of one.")
    if not path.is_dir():
        return Log(_foreign_lines(path), _settings(config or "config/sd15.py"))
    lines = read_metrics(path)
    if not all(isinstance(line, dict) for line in lines):
        raise UserError(f"{path / METRICS}: a line is no JSON object.")
    rollouts = [line for line in lines if "rollout" in line and "evaluation" not in line]
    if not rollouts and any("accuracy" in line for line in lines):
        raise UserError(f"{path} trained a preference model; name a run of the method.")
    settings = _settings(config or path / CONFIG)
    return Log(rollouts, settings, evaluations(lines), True, _count_weights(path))


def evaluations(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the lines of metrics.jsonl that hold a verdict, one of each epoch, in order."""
    by_epoch = {line["evaluation"]: line for line in lines if "evaluation" in line}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def _settings(source: str | Path) -> Settings:
    """Returns the settings in a config file; a run's config.json may be of another version."""
    named = isinstance(source, str)
    config = json.loads(load_config(source if named else "config/base.py").to_json())
    values = config | config["sample"] | config["train"]
    if not named:
        try:
            own = json.loads(source.read_text())
            values |= own | own["sample"] | own["train"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{source}: cannot be read as a run's config ({error}).") from error
    return fill(Settings, values)


def _count_weights(run_dir: Path) -> int | None:
    from spo.lora_io.write import LORA_FILE  # loads torch

    files = [folder / LORA_FILE for folder in (*checkpoints(run_dir)[-1:], run_dir)]
    for path in filter(Path.is_file, files):
        try:
            with safe_open(path, "np") as file:
                return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):  # a checkpoint that is being deleted
            continue
    return None


def _foreign_lines(path: Path) -> list[dict[str, float]]:
    """Returns the numbers of other code, by our names."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: known are run directories, and {', '.join(readers)} files.")
    try:
        rows = list(readers[path.suffix.lower()](path))
        keys = list(dict.fromkeys(key for row in rows for key in row))
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: not a table of numbers: {error}") from error
    ours: dict[str, str] = {}
    for key in keys:
        # wandb's web page names a column "run - loss"; trackers group as in "train/loss".
        name = _OURS.get(re.split(r"/| - ", key)[-1].strip().lower().replace(" ", "_"))
        if name in ours and name in _CHECKED:
            raise UserError(f"{path}: both {ours[name]!r} and {key!r} are {name}; keep one run's.")
        if name is not None:
            ours.setdefault(name, key)
    if not _CHECKED & set(ours):
        there = ", ".join(map(str, keys[:12])) or "none at all"
        raise UserError(f"{path} has none of {', '.join(sorted(_CHECKED))} (there: {there}).")
    lines = ({name: _number(row.get(key)) for name, key in ours.items()} for row in rows)
    return [{name: value for name, value in line.items() if value is not None} for line in lines]


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _read_jsonl(path: Path) -> Iterable[dict]:
    return map(json.loads, filter(str.strip, whole_lines(path)))


def _read_json(path: Path) -> Iterable[dict]:
    return json.loads(path.read_bytes())


def _read_csv(path: Path) -> Iterable[dict]:
    return csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
