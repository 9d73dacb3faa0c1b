"""Folders of checkpoints: complete under their names, sealed with checksums, in order of progress."""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from spo.atomic import PARTIAL, sync_file, sync_folder, write_file, writing
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.run.folder import CHECKPOINTS, file_digest

STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
CHOSEN = "best"  # in a run: a link to the checkpoint that its evaluations chose
_MANIFEST = "manifest.json"  # size and SHA-256 of every other file
# Raised by reading a damaged or foreign checkpoint.
READ_ERRORS = (*LOAD_ERRORS, KeyError, TypeError, AttributeError, ArithmeticError)


@contextlib.contextmanager
def new_checkpoint(run_dir: Path, name: str, limit: int) -> Iterator[Path]:
    """Yields a folder to fill, which appears under its name once all of it is on the disk.

    Then deletes the oldest checkpoints beyond `limit` (0 keeps all), but never the one that `best`
    links to. Raises RunError if the disk refuses; earlier checkpoints remain.
    """
    folder = run_dir / CHECKPOINTS / name
    partial = folder.with_name(name + PARTIAL)
    with writing(folder):
        folder.parent.mkdir(exist_ok=True)  # a run directory that vanished is not made again
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
            if old.name != _chosen(run_dir).name:
                # By another name first: half of a checkpoint must not look like one.
                shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))


def link_best(run_dir: Path, folder: Path | None) -> None:
    """Makes `best` of a run a link to one of its checkpoints, atomically; None removes the link.

    Where the file system has no links, `best` is a text file that names the checkpoint. Raises
    RunError if the disk refuses.
    """
    link = run_dir / CHOSEN
    partial = link.with_name(CHOSEN + PARTIAL)
    with writing(link):
        if link.is_dir() and not link.is_symlink():  # the run was copied, with what the link meant
            shutil.rmtree(link)
        if folder is None:
            link.unlink(missing_ok=True)
            return
        target = f"{CHECKPOINTS}/{folder.name}"
        partial.unlink(missing_ok=True)
        try:
            partial.symlink_to(target)
        except OSError:
            write_file(partial, f"{target}\n".encode())
        partial.replace(link)
        sync_folder(run_dir)


def best(run_dir: Path) -> Path | None:
    """Returns the checkpoint that `best` of a run links to, if it is there and whole, or None."""
    folder = _chosen(run_dir)
    return folder if find_fault(folder) is None else None


def _chosen(run_dir: Path) -> Path:
    """Returns the folder that `best` of a run stands for, which may be missing."""
    link = run_dir / CHOSEN
    if link.is_symlink():
        return run_dir / link.readlink()
    return run_dir / link.read_text(errors="replace").strip() if link.is_file() else link


def checkpoints(run_dir: Path) -> list[Path]:
    """Returns the complete checkpoints of a run, in the order of its progress.

    Names have numbers from coarse to fine: epoch_0003 is before epoch_0003_rollout_000012, which is
    before epoch_0003_rollout_000012_pair_000040.
    """
    found = [p for p in (run_dir / CHECKPOINTS).glob("*_[0-9]*") if not p.suffix]
    return sorted(found, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder.name)])


def find_fault(folder: Path) -> str | None:
    """Returns the fault in the files of a checkpoint, by its manifest, or None."""
    try:
        if not (folder / _MANIFEST).is_file():
            return f"{_MANIFEST} is missing"
        files = _files(folder)
        for name, wanted in json.loads(files[_MANIFEST].read_text()).items():
            if name not in files:  # devices and what lies elsewhere are none of its files
                return f"{name} is missing"
            size = files[name].stat().st_size
            if size != wanted["size"]:
                return f"{name} has {size:,} of {wanted['size']:,} bytes"
            if file_digest(files[name]) != wanted["sha256"]:
                return f"{name} has another checksum than when it was written"
    except READ_ERRORS as error:
        return f"{_MANIFEST} cannot be used: {first_line(error)}"
    return None


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the numbers of a checkpoint."""
    write_file(folder / STATE, json.dumps(state, indent=1).encode())


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the numbers that `write_state` wrote; raises UserError if they cannot be read."""
    with reading(folder):
        return dict(json.loads((folder / STATE).read_text()))


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turns an error within the context into a UserError: the checkpoint does not fit the config."""
    try:
        yield
    except READ_ERRORS as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(
            f"resume_from: {folder} is not a checkpoint of this config ({reason}); "
            "choose another checkpoint, or start again."
        ) from error


def _files(folder: Path) -> dict[str, Path]:
    """Returns the regular files in a folder and its folders, by name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def check_numbers(
    numbers: Mapping[str, Any], least: int = 0, kinds: Collection[type] = (int,)
) -> None:
    """Raises ValueError unless all `numbers` are of `kinds`, finite and from `least`."""
    for name, value in numbers.items():
        most = 2**63 if type(value) is int else math.inf
        if type(value) not in kinds or not least <= value < most:
            raise ValueError(f"{name} is {value!r}")


def _seal(folder: Path) -> None:
    """Brings every file to the disk, and writes the sizes and checksums to the manifest."""
    files = {}
    for name, path in _files(folder).items():
        sync_file(path)
        files[name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    write_file(folder / _MANIFEST, json.dumps(files, indent=1).encode())
