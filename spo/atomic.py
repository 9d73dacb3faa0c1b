"""Writes files whole or not at all, even if the process is killed or the machine stops."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from safetensors import SafetensorError

from spo.errors import RunError, UserError, WriteError, first_line

PARTIAL = ".partial"  # ends the names of incomplete files and folders


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write within the context into a RunError that names `path` and the disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps OSError in its own error
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"cannot write {path}: {reason}; mend that, then go on from the last "
            "checkpoint by resume_from=auto."
        ) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an OSError within the context into a WriteError that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or first_line(error), str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that atomically replaces the file `path` on exit; or WriteError."""
    partial = path.with_name(path.name + PARTIAL)
    with naming(path):
        try:
            yield partial
            sync_file(partial)
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` as the file `path`, atomically."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as the JSON file `path`, atomically, and its folder if missing."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, in one write."""
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def whole_lines(path: Path) -> list[str]:
    """Returns the lines of a file, none if it is missing, without an incomplete last line."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].decode(errors="replace").splitlines()


def write_lines(path: Path, lines: list[str]) -> None:
    """Writes `lines` as the file `path`, atomically."""
    write_file(path, "".join(f"{line}\n" for line in lines).encode())


def sync_file(path: Path) -> None:
    """Returns once the contents of a file are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Returns once the names in a folder are on the disk, if its file system can promise that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def check_output(path: Path, key: str) -> None:
    """Makes the folder of `path`; raises UserError that names `key` if it takes no file `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write {path} ({error.strerror}).") from error


@contextlib.contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces the file or folder `path` on exit; errors remove it.

    Of a link, what it leads to is replaced. Raises UserError that names --output if writing fails.
    """
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(suffix=PARTIAL, dir=path.parent) as folder:
            partial = Path(folder) / path.name
            yield partial
            if path.is_dir():
                shutil.rmtree(path)
            partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output: cannot write {path} ({error}).") from error
