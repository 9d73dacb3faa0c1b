"""What of a run is published, copied into RUN_DIR/hub and laid out there as in the repo."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from spo.evaluation import results
from spo.hub import Destination
from spo.lora_io.diffusers_file import LORA_FILE
from spo.publish.card import GRID, make_card, published_samples
from spo.publish.record import RunRecord, read_record
from spo.run.folder import CONFIG, METRICS, SAMPLES, TABLE

CARD = "README.md"
_FOLDER = "hub"


@dataclass(frozen=True)
class Staged:
    """A folder laid out as the repo, and what is in it in a few words."""

    folder: Path
    summary: str


def stage(run_dir: Path, to: Destination, evaluation: Path | None = None) -> Staged:
    """Copy what is published into RUN_DIR/hub; UserError where the run lacks it.

    `evaluation` is a folder with a results.json; None: every evaluation* of the run.
    """
    record = read_record(run_dir, to.weights, evaluation)
    folder = run_dir / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in _files(record).items():
        target = folder / to.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    config = json.dumps(record.config.to_dict(), indent=2) + "\n"
    (folder / to.path(CONFIG)).write_text(config)
    for name, found in record.evaluations.items():
        target = folder / to.path(name)
        target.mkdir()
        results.write_results(found, target)
        (target / TABLE).write_text(results.summary_table(found) + "\n")
    make_card(record, to).save(folder / CARD)
    reached = f" after epoch {record.epochs}" if record.epochs else ""
    return Staged(folder, f"{record.config.algorithm} LoRA, {to.weights} weights{reached}")


def _files(record: RunRecord) -> dict[str, Path]:
    """Files that are published as they are, by their name there."""
    files = {LORA_FILE: record.lora}
    files |= {f"{SAMPLES}/{path.name}": path for path in published_samples(record)}
    if record.grid is not None:
        files[GRID] = record.grid
    if (record.run_dir / METRICS).is_file():
        files[METRICS] = record.run_dir / METRICS
    return files
