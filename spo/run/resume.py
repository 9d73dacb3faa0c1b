"""Resuming a run: finding the checkpoint, and listing the changes since it was saved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spo.command_line.config_files import leaves
from spo.errors import UserError
from spo.launch.batch_plan import UpdatePlan
from spo.run.checkpoint_folder import checkpoints, find_fault
from spo.run.folder import METRICS, versions


@dataclass(frozen=True)
class Resume:
    """The checkpoint that a run resumes from."""

    checkpoint: Path | None  # None: a new run
    damaged: Mapping[Path, str] = field(default_factory=dict)  # newer checkpoints, and their faults

    def is_newest(self, own: Sequence[Path]) -> bool:
        """Tells if the run's `own` checkpoints are still those that this one was chosen from."""
        return [each for each in own if each not in self.damaged][-1:] in ([], [self.checkpoint])

    def describe(self) -> list[str]:
        """Returns lines that name the checkpoint and each damaged newer one."""
        lines = [f"resume: {name} is damaged ({fault})" for name, fault in self.damaged.items()]
        return [*lines, f"resumed from {self.checkpoint}"]


NEW_RUN = Resume(None)


def find_checkpoint(run_dir: Path, run_name: str, resume_from: str) -> Resume:
    """Returns the checkpoint to resume from: the run's newest whole one, or the one named.

    Raises UserError if there is none, and if a new run would overwrite one that is there.
    """
    own = checkpoints(run_dir)
    if resume_from == "auto":
        if not run_name:
            raise UserError("resume_from: auto goes on with a run; say which one by run_name.")
        damaged = {}
        for folder in reversed(own):
            if (fault := find_fault(folder)) is None:
                return Resume(folder, damaged)
            damaged[folder] = fault
        if damaged:
            raise UserError(
                f"resume_from: no checkpoint of {run_dir} is whole ({'; '.join(damaged.values())}); "
                "start again under another run_name."
            )
        return NEW_RUN
    if resume_from:
        return Resume(_named_checkpoint(resume_from, run_dir, own))
    if own or (run_dir / METRICS).exists():
        raise UserError(
            f"run_name: {run_dir} already holds a run; choose another run_name, or go on with it "
            "by resume_from=auto."
        )
    return NEW_RUN


def _named_checkpoint(name: str, run_dir: Path, own: list[Path]) -> Path:
    folder = Path(name).expanduser()
    if (fault := find_fault(folder)) is not None:
        raise UserError(
            f"resume_from: {folder} is not a checkpoint, or is damaged ({fault}); name another folder "
            "of runs/NAME/checkpoints, or run_name=NAME and resume_from=auto."
        )
    if own and folder.resolve() == own[-1].resolve():
        return own[-1]
    if not (own or (run_dir / METRICS).exists()):
        return folder.resolve() if folder.is_symlink() else folder  # best/ may mean another later
    raise UserError(
        f"run_name: {run_dir} already went on from another point than {folder}; choose another "
        "run_name to branch off there, or resume_from=auto."
    )


def checkpoint_facts(config: Mapping[str, Any], plan: UpdatePlan) -> dict[str, Any]:
    """Returns the entries of a checkpoint that `changes` reads; `config` is the JSON of a config."""
    return {"config": config, "plan": asdict(plan), "versions": versions()}


def changes(
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    plan: UpdatePlan,
    refusal: Callable[[str], str | None],
) -> list[str]:
    """Returns a line for each difference from the run that saved `state`.

    `refusal` returns the reason why a key of the config may not change, or None. Raises UserError for
    a changed key that may not.
    """
    then, now = leaves(ConfigDict(state["config"])), leaves(ConfigDict(config))
    lines = []
    for key in sorted(then.keys() | now.keys()):
        before, after = then.get(key, "unknown"), now.get(key, "unknown")
        if before == after or key == "resume_from":
            continue
        reason = refusal(key) if key in then else None
        if reason is not None:
            raise UserError(
                f"{key}: {after!r}, but the checkpoint was trained with {before!r}; {reason}."
            )
        lines.append(f"resume: {key} was {before!r}, and is {after!r} from here on")
    processes = state["plan"]["num_processes"]
    if processes != plan.num_processes:
        lines.append(
            f"resume: {processes} processes before, {plan.num_processes} from here on: prompts, "
            "noise and the order of the pairs stay, sums are rounded otherwise"
        )
    then, now = state["versions"], versions()
    changed = [
        f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]
    ]
    if changed:
        lines.append(f"resume: other versions than before: {', '.join(changed)}")
    return lines
