"""The record that a run left of itself, without the paths of the machine it ran on."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from spo.atomic import whole_lines
from spo.command_line.config_files import BASE, load_config
from spo.command_line.values import require_choice
from spo.errors import UserError, first_line
from spo.evaluation.results import Results, read_results
from spo.hub import Destination, public_name
from spo.lora_io.write import LORA_FILE
from spo.models.families import FAMILIES
from spo.run.checkpoint_folder import CHOSEN, best, find_fault
from spo.run.folder import CHECKPOINTS, CONFIG, METRICS, RESULTS, SAMPLES, SAMPLES_INDEX, STARTS

_SAMPLES = 4  # images that are published one by one


@dataclass(frozen=True)
class RunRecord:
    """A run directory, as far as others may see it."""

    config: ConfigDict  # without paths of this machine
    weights: str  # the LoRA that is published: "policy" or "ema"
    lora: Path
    checkpoint: str  # that it is from; empty: the run directory itself
    updates: int  # optimizer steps that the LoRA has seen
    rollouts: int  # likewise; 0: the run has no metrics
    epochs: int  # likewise; the last one may be incomplete
    start: Mapping[str, Any]  # plan, prompts, versions and device of the last start
    samples: Mapping[Path, str]  # prompts of some of the last validation images
    evaluations: Mapping[str, Results]  # by the names of their folders


def read_config(run_dir: Path) -> ConfigDict:
    """Returns the config of a run; raises UserError if `run_dir` holds none."""
    if not (run_dir / CONFIG).is_file():
        raise UserError(f"{run_dir}: no {CONFIG} in it; name the directory of a run.")
    config = load_config(str(run_dir / CONFIG), BASE)
    require_choice(f"{run_dir / CONFIG}: family", config.family, FAMILIES)  # it names a .py file
    return config


def read_record(run_dir: Path, to: Destination, evaluation: Path | None = None) -> RunRecord:
    """Returns a run's record with the results in `evaluation`, or its own; UserError if unreadable."""
    config, folder = read_config(run_dir), _lora_folder(run_dir, to.checkpoint)
    lora = folder / LORA_FILE if to.weights == "policy" else folder / to.weights / LORA_FILE
    updates = _updates(lora)
    lines = [json.loads(line) for line in whole_lines(run_dir / METRICS)]
    reached = [{}, *(line for line in lines if line["step"] <= updates)][-1]
    starts = whole_lines(run_dir / STARTS)
    start = {"prompts": ""} | (json.loads(starts[-1]) if starts else {})
    source = config.prompts.source
    return RunRecord(
        config=ConfigDict(public_values(config.to_dict())),
        weights=to.weights,
        lora=lora,
        checkpoint=folder.name if to.checkpoint else "",
        updates=updates,
        rollouts=reached.get("rollout", 0),
        epochs=reached.get("epoch", 0),
        start=start | {"prompts": start["prompts"].replace(source, public_name(source))},
        samples=_samples(run_dir / SAMPLES, to.weights, lines, updates),
        evaluations=_evaluations(run_dir, evaluation, own=not to.checkpoint),
    )


def public_values(values: Any) -> Any:
    """Returns nested settings with `public_name` of every text in them."""
    if isinstance(values, Mapping):
        return {key: public_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(public_values(value) for value in values)
    return public_name(values) if isinstance(values, str) else values


def _lora_folder(run_dir: Path, checkpoint: str) -> Path:
    """Returns the folder whose LoRA is published; raises UserError if that checkpoint is not whole."""
    if checkpoint == CHOSEN:
        if (folder := best(run_dir)) is None:
            raise UserError(
                f"checkpoint: {run_dir} has no whole best checkpoint: evaluations with eval.judges "
                "choose it; name a folder of its checkpoints/, or leave checkpoint empty."
            )
        return folder
    folder = run_dir / CHECKPOINTS / checkpoint if checkpoint else run_dir
    if checkpoint and (fault := find_fault(folder)) is not None:
        raise UserError(
            f"checkpoint: {folder} is not a checkpoint, or is damaged ({fault}); name another."
        )
    return folder


def _updates(lora: Path) -> int:
    if not lora.is_file():
        raise UserError(f"{lora}: no such LoRA; finish or resume the run, or choose other weights.")
    try:
        with safe_open(lora, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{lora} is not a LoRA of a run ({first_line(error)}).") from error


def _evaluations(run_dir: Path, evaluation: Path | None, own: bool) -> dict[str, Results]:
    all_own = sorted(path.parent for path in run_dir.glob(f"evaluation*/{RESULTS}")) if own else []
    folders = {"evaluation": evaluation} if evaluation else {path.name: path for path in all_own}
    public = {}
    for name, path in folders.items():
        found = read_results(path)
        models = tuple(
            replace(model, spec=public_name(model.spec), lora=public_name(model.lora))
            for model in found.models
        )
        settings = public_values(found.settings)
        public[name] = replace(found, models=models, settings=settings)
    return public


def _samples(
    folder: Path, weights: str, lines: Sequence[Mapping[str, Any]], updates: int
) -> dict[Path, str]:
    """Returns images of this LoRA or an earlier state of it, with prompts; none of the base model."""
    index = folder / SAMPLES_INDEX
    if not index.is_file():
        return {}
    drawn = json.loads(index.read_text())
    steps = [line["step"] for line in lines if line["epoch"] == drawn["epochs"] > 0]
    if drawn["weights"] != weights or not steps or max(steps) > updates:
        return {}
    # Plain names alone: the index may have come with somebody's run.
    own = {n: p for n, p in drawn["prompts"].items() if re.fullmatch(r"\w[\w.-]*", n)}
    return {folder / name: prompt for name, prompt in islice(own.items(), _SAMPLES)}
