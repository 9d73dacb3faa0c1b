"""RUN_DIR/hub: a copy of what is published of a run, laid out as in the repo."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from spo.evaluation.results import summary_table, write_results
from spo.hub import Destination
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import KOHYA_FILE, LORA_FILE, write_diffusers, write_kohya
from spo.plugins import algorithm_name
from spo.publish.card import make_card
from spo.publish.record import read_record
from spo.run.folder import CONFIG, METRICS, SAMPLES, TABLE

CARD = "README.md"


def lay_out(run_dir: Path, to: Destination, evaluation: Path | None = None) -> tuple[Path, str]:
    """Copies what is published into RUN_DIR/hub; returns that folder, and its content in few words.

    `evaluation` is a folder with a results.json; None: every evaluation* of the run, but none for a
    checkpoint: they may be of other weights. Raises UserError if the run lacks a part of what is
    published.
    """
    record = read_record(run_dir, to, evaluation)
    folder = run_dir / "hub"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / to.subfolder).mkdir(parents=True, exist_ok=True)
    files = {f"{SAMPLES}/{path.name}": path for path in record.samples}
    if (run_dir / METRICS).is_file():
        files[METRICS] = run_dir / METRICS
    for name, source in files.items():
        target = folder / to.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    # Many readers of diffusers' format, and all old ones, take the rank for alpha.
    lora = replace(read_lora_file(record.lora, str(run_dir)).folded(), family=record.config.family)
    write_diffusers(lora, folder / to.path(LORA_FILE))
    write_kohya(lora, folder / to.path(KOHYA_FILE))
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
    return folder, f"{name} LoRA, {to.weights} weights{reached}"
