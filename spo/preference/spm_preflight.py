"""Everything that can be found wrong with the training of an SPM before a model is loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ml_collections import ConfigDict

from spo import scorers
from spo.command_line.config_files import check_leaves
from spo.command_line.values import fill
from spo.errors import UserError
from spo.hub import resolve_file
from spo.launch.batch_plan import UpdatePlan, plan_updates
from spo.method.build import model_source
from spo.models import backbone
from spo.preference import spm_build
from spo.preference.batches import decode_pair
from spo.preference.rows import fault_of, pick, usable_rows
from spo.preference.source import open_split
from spo.run.checkpoint_folder import read_state, reading
from spo.run.folder import run_name
from spo.run.resume import Resume, compare, find_checkpoint
from spo.run.tracking import TrackerSettings

_FIRST_ROWS = 10_000  # of a stream, to look at before a run starts


@dataclass(frozen=True)
class Rows:
    """What is known of a split before a run."""

    usable: tuple[int, ...] | None  # indices of its rows without a label fault; None of a stream
    faults: Counter  # why its other rows are left out
    description: str


@dataclass(frozen=True)
class Preflight:
    """What a run needs to know before it loads its models."""

    plan: UpdatePlan
    train: Rows
    validation: Rows | None
    run_dir: Path
    resume: Resume
    changes: tuple[str, ...]  # since the checkpoint to resume from, a line each


def preflight(config: ConfigDict, num_processes: int) -> Preflight:
    """Check config, files and rows; nothing is written. UserError in one line."""
    check_leaves(config)
    spm_build.check(config)
    fill(TrackerSettings, config.tracker)
    plan = plan_updates(config, num_processes)
    run_dir = Path(config.logdir).expanduser() / run_name(config, "spm")
    resume = find_checkpoint(config, run_dir)
    changes = changes_since(resume.checkpoint, config, plan)
    backbone.check_source(model_source(config), config.family)
    scorers.check_clip(config.preference.backbone, config.preference.processor)
    if config.preference.init_from:
        resolve_file(config.preference.init_from, "preference.init_from")
    if config.labels.source == "pickscore":
        scorers.check_clip(config.labels.backbone, config.labels.processor, "labels")
    train = read_rows(config, config.data.train_split)
    validation = None
    if config.eval_steps and config.data.validation_split:
        validation = read_rows(config, config.data.validation_split, need_has_label=True)
    return Preflight(plan, train, validation, run_dir, resume, changes)


_REFUSED = dict.fromkeys(
    ("family", "pretrained.model", "preference.backbone"),
    "its weights and optimizer state mean nothing to another",
) | dict.fromkeys(
    ("seed", "data.train_split", "data.streaming", "data.shuffle_buffer"),
    "which rows come next follows from it",
)


def changes_since(checkpoint: Path | None, config: ConfigDict, plan: UpdatePlan) -> tuple[str, ...]:
    """What has changed since a checkpoint, a line each; UserError for what makes nonsense of it."""
    if checkpoint is None:
        return ()
    state = read_state(checkpoint)
    with reading(checkpoint):
        lines = compare(state, config, plan, _REFUSED)
        before = UpdatePlan(**state["plan"]).pairs_per_update
    if before != plan.pairs_per_update:
        lines.append(
            f"resume: {before} pairs per update before, {plan.pairs_per_update} from here on: rows "
            "are counted by updates, so that some come again or never"
        )
    return tuple(lines)


def read_rows(config: ConfigDict, split: str, need_has_label: bool = False) -> Rows:
    """Find the rows of a split that can be used; UserError where there are none.

    Of the images, they are looked at until one pair of them is sound; so are the rows of a stream.
    """
    rows = open_split(spm_build.data_source(config), split)
    if config.data.streaming:
        usable, faults, candidates = None, Counter(), islice(rows, _FIRST_ROWS)
        name = f"{config.data.source}, split {split!r}, streamed"
    else:
        usable, faults = usable_rows(rows, need_has_label)
        candidates = (pick(rows, [index])[0] for index in usable)
        name = (
            f"{config.data.source}, split {split!r}: {len(usable):,} of {len(rows):,} rows usable"
        )
    seen = Counter()
    for row in candidates:
        fault = fault_of(row, need_has_label) or decode_pair(row, config.data.image_size)[1]
        if fault is None:
            description = f"{name}{describe_faults(faults)}"
            return Rows(None if usable is None else tuple(usable), faults, description)
        seen[fault] += 1
    raise UserError(
        f"data.source: {config.data.source}, split {split!r}, has no usable row"
        f"{describe_faults(faults + seen)}."
    )


def describe_faults(faults: Counter) -> str:
    """How many rows were left out for which reason, in parentheses; empty where none were."""
    counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(faults.items()))
    return f" (left out: {counts})" if counts else ""
