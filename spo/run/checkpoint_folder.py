"""Folders of checkpoints: complete under their names, sealed with checksums, in order of progress."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spo.atomic import PARTIAL, sync_file, sync_folder, write_file, writing
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.run.folder import CHECKPOINTS

STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
_MANIFEST = "manifest.json"  # size and SHA-256 of every other file
_DAMAGED = ".damaged"
# What reading a damaged or foreign checkpoint raises, wherever it goes wrong.
READ_ERRORS = (*LOAD_ERRORS, KeyError, TypeError, AttributeError)


@contextlib.contextmanager
def new_checkpoint(run_dir: Path, name: str, limit: int) -> Iterator[Path]:
    """A folder to fill, which appears under its name once all of it is on the disk.

    Only then are the oldest checkpoints beyond `limit` deleted (0 keeps all). RunError where the disk
    refuses; the checkpoints before remain.
    """
    folder = run_dir / CHECKPOINTS / name
    partial = folder.with_name(name + PARTIAL)
    with writing(folder):
        folder.parent.mkdir(exist_ok=True)  # a run directory that vanished is not made anew
        for left in folder.parent.glob("*" + PARTIAL):
            shutil.rmtree(left)
        try:
            partial.mkdir()
            yield partial
            _seal(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(folder.parent)
        sync_folder(run_dir)
        for old in checkpoints(run_dir)[:-limit] if limit else ():
            # By another name first: half of a checkpoint must not look like one.
            shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, in the order of its progress.

    Names tell how far it came by numbers from coarse to fine: epoch_0003 is before
    epoch_0003_rollout_000012, and that before epoch_0003_rollout_000012_pair_000040.
    """
    found = [p for p in (run_dir / CHECKPOINTS).glob("*_[0-9]*") if not p.suffix]
    return sorted(found, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.name)])


def newest_whole(run_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint without fault, and the newer ones with theirs."""
    faults = {}
    for folder in reversed(checkpoints(run_dir)):
        fault = find_fault(folder)
        if fault is None:
            return folder, faults
        faults[folder] = fault
    return None, faults


def find_fault(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, by its manifest; None: nothing."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())
        for name, wanted in files.items():
            size = (folder / name).stat().st_size
            if size != wanted["size"]:
                return f"{name} has {size:,} of {wanted['size']:,} bytes"
            if _sha256(folder / name) != wanted["sha256"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except READ_ERRORS as error:
        return f"{_MANIFEST} cannot be used: {first_line(error)}"
    return None


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that the run can save others in their place."""
    for folder in damaged:
        aside = folder.with_name(folder.name + _DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` looks like a checkpoint, whole or damaged."""
    return any((folder / name).is_file() for name in (_MANIFEST, STATE))


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the numbers of a checkpoint."""
    write_file(folder / STATE, json.dumps(state, indent=1).encode())


def read_state(folder: Path) -> dict[str, Any]:
    """The numbers that `write_state` wrote; UserError where they cannot be read."""
    with reading(folder):
        return dict(json.loads((folder / STATE).read_text()))


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever fails within is the UserError of a checkpoint that does not fit the config."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(
            f"resume_from: {folder} is not a checkpoint of this config ({first_line(error)}); "
            "choose another checkpoint, or start anew."
        ) from error


def _seal(folder: Path) -> None:
    """Bring every file to the disk, and write their sizes and checksums beside them."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync_file(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    write_file(folder / _MANIFEST, json.dumps(files, indent=1).encode())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
