"""Files and folders that appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from spo.errors import UserError


def check_output(path: Path, mark: str | None, overwrite: bool) -> None:
    """Raise UserError unless `path` may be written, as a .safetensors file or as a folder.

    `mark` is a file that every folder of this kind has: no other folder is overwritten. None: a file.
    """
    if (path.suffix == ".safetensors") != (mark is None):
        wanted = "end in .safetensors" if mark is None else "be a folder"
        raise UserError(f"--output: {path} must {wanted}.")
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"--output: {path} exists; choose another, or add --overwrite.")
    if path.is_dir() if mark is None else not (path / mark).is_file():
        raise UserError(f"--output: {path} holds something else, and is not overwritten.")


@contextlib.contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end, or vanishes on any error.

    Raises UserError where the disk refuses.
    """
    partial = path.with_name(f"{path.name}.partial")
    _remove(partial)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output: cannot write {path} ({error}).") from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
