"""RUN_DIR/hub: a copy of what is published of a run, laid out as in the repo."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from spo.evaluation.results import summary_table, write_results
from spo.hub import Destination
from spo.lora_io.write import LORA_FILE
from spo.plugins import algorithm_name
from spo.publish.card import GRID, make_card, published_samples
from spo.publish.record import RunRecord, read_record
from spo.run.folder import CONFIG, METRICS, SAMPLES, TABLE

CARD = "README.md"
_FOLDER = "hub"


@dataclass(frozen=True)
class Layout:
    """A folder laid out as the repo, and its content in a few words."""

    folder: Path
    summary: str


def lay_out(run_dir: Path, to: Destination, evaluation: Path | None = None) -> Layout:
    """Copies what is published into RUN_DIR/hub; raises UserError if the run lacks a part of it.

    `evaluation` is a folder with a results.json; None: every evaluation* of the run.
    """
    record = read_record(run_dir, to.weights, evaluation)
    folder = run_dir / _FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in _copies(record).items():
        target = folder / to.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    config = json.dumps(record.config.to_dict(), indent=2) + "\n"
    (folder / to.path(CONFIG)).write_text(config)
    for name, results in record.evaluations.items():
        target = folder / to.path(name)
        target.mkdir()
        write_results(results, target)
        (target / TABLE).write_text(summary_table(results) + "\n")
    make_card(record, to).save(folder / CARD)
    reached = f" after epoch {record.epochs}" if record.epochs else ""
    name = algorithm_name(record.config.algorithm)
    return Layout(folder, f"{name} LoRA, {to.weights} weights{reached}")


def _copies(record: RunRecord) -> dict[str, Path]:
    """Returns the files that are published unchanged, by their names in the repo."""
    files = {LORA_FILE: record.lora}
    files |= {f"{SAMPLES}/{path.name}": path for path in published_samples(record)}
    if record.grid is not None:
        files[GRID] = record.grid
    if (record.run_dir / METRICS).is_file():
        files[METRICS] = record.run_dir / METRICS
    return files
