"""Going on with a run: which checkpoint, and what has changed since it was saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spo.command_line.config_files import leaves
from spo.errors import Stopped, UserError
from spo.launch.batch_plan import UpdatePlan
from spo.run.checkpoint_folder import checkpoints as checkpoints_of
from spo.run.checkpoint_folder import find_fault, is_checkpoint, newest_whole
from spo.run.folder import METRICS, versions


@dataclass(frozen=True)
class Resume:
    """What a run goes on from."""

    checkpoint: Path | None  # None: it starts anew
    damaged: Mapping[Path, str] = field(default_factory=dict)  # newer checkpoints, and their faults

    def describe(self) -> list[str]:
        """Where the run goes on, with a line for each damaged checkpoint."""
        lines = [f"resume: {name} is damaged ({fault})" for name, fault in self.damaged.items()]
        return [*lines, f"resumed from {self.checkpoint}"]


def find_checkpoint(config: ConfigDict, run_dir: Path) -> Resume:
    """The checkpoint to resume from: the newest one of the run that is whole, or the one named.

    Raises UserError where there is none, and rather than write over what a run has computed.
    """
    own = checkpoints_of(run_dir)
    if config.resume_from == "auto":
        if not config.run_name:
            raise UserError("resume_from: auto goes on with a run; say which one by run_name.")
        checkpoint, damaged = newest_whole(run_dir)
        if damaged and checkpoint is None:
            faults = "; ".join(f"{folder.name}: {fault}" for folder, fault in damaged.items())
            raise UserError(
                f"resume_from: no checkpoint of {run_dir} is whole ({faults}); start anew under "
                "another run_name."
            )
        return Resume(checkpoint, damaged)
    if config.resume_from:
        return Resume(_named_checkpoint(config.resume_from, run_dir, own))
    if own or (run_dir / METRICS).exists():
        raise UserError(
            f"run_name: {run_dir} already holds a run; choose another run_name, or go on with it "
            "by resume_from=auto."
        )
    return Resume(None)


def _named_checkpoint(name: str, run_dir: Path, own: list[Path]) -> Path:
    folder = Path(name).expanduser()
    if not is_checkpoint(folder):
        raise UserError(
            f"resume_from: {folder} is not a checkpoint; name a folder of "
            "runs/NAME/checkpoints, or run_name=NAME and resume_from=auto."
        )
    fault = find_fault(folder)
    if fault is not None:
        raise UserError(
            f"resume_from: {folder} is damaged ({fault}); name the checkpoint before it."
        )
    if own and folder.resolve() == own[-1].resolve():
        return own[-1]
    if not (own or (run_dir / METRICS).exists()):
        return folder
    raise UserError(
        f"run_name: {run_dir} already went on from another point than {folder}; choose another "
        "run_name to branch off there, or resume_from=auto."
    )


def facts(config: ConfigDict, plan: UpdatePlan) -> dict[str, Any]:
    """What a checkpoint tells of the run that saved it, for `compare`."""
    return {"config": json.loads(config.to_json()), "plan": asdict(plan), "versions": versions()}


def compare(
    state: Mapping[str, Any], config: ConfigDict, plan: UpdatePlan, refused: Mapping[str, str]
) -> list[str]:
    """What is different from the run that saved `state`, a line each.

    Raises UserError for a changed key that is `refused` (each with the reason).
    """
    then = leaves(ConfigDict(state["config"]))
    now = leaves(ConfigDict(json.loads(config.to_json())))
    lines = []
    for key in sorted({*then, *now} - {"resume_from"}):
        before, after = then.get(key, "unknown"), now.get(key, "unknown")
        if before == after:
            continue
        if key in refused:
            raise UserError(
                f"{key}: {after!r}, but the checkpoint was trained with {before!r}; {refused[key]}."
            )
        lines.append(f"resume: {key} was {before!r}, and is {after!r} from here on")
    processes = state["plan"]["num_processes"]
    if processes != plan.num_processes:
        lines.append(
            f"resume: {processes} processes before, {plan.num_processes} from here on: prompts, "
            "noise and the order of the pairs stay, sums are rounded otherwise"
        )
    others = {name: now for name, now in versions().items() if state["versions"].get(name) != now}
    if others:
        changes = (f"{name} {state['versions'].get(name)} -> {now}" for name, now in others.items())
        lines.append(f"resume: other versions than before: {', '.join(changes)}")
    return lines


def stopped_at(checkpoint: Path) -> Stopped:
    """A Stopped that says where everything is, and how to go on."""
    return Stopped(
        f"by a signal; everything is in {checkpoint}: the same command with "
        f"--config.run_name={checkpoint.parents[1].name} --config.resume_from=auto goes on."
    )
