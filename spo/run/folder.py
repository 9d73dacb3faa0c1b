"""The directory that holds everything a run did."""

import contextlib
import json
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub.utils.sha import sha_fileobj

from spo.atomic import whole_lines, write_file, write_lines, writing
from spo.errors import UserError

# The files and folders of a run, and of an evaluation.
CONFIG = "config.json"
STARTS = "starts.jsonl"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SAMPLES, SAMPLES_INDEX = "samples", "samples.json"  # the newest validation images one by one
SPM_FILE = "step_aware_preference_model.safetensors"
LRM_FILE, LRM_FOLDER = "latent_reward_model.safetensors", "latent_reward_model"
BEST = "best.safetensors"  # what learns of a preference model at its best, until the run ends
REPORT, RESULTS, TABLE = "report.html", "results.json", "table.md"

_LOCK, _HOLDER = ".lock", ".lock_holder"
_LONGEST_NAME = 200  # bytes; file systems take 255
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def run_folder(logdir: str, run_name: str, method: str, family: str) -> Path:
    """Returns the run directory: `run_name` in `logdir`, by default method, family and start time.

    Raises UserError unless the name is that of one folder. A default name is new at every call.
    """
    default = f"{method}_{family}_{time.strftime('%Y%m%d_%H%M%S')}_{secrets.token_hex(2)}"
    name = run_name or default
    plain = name.isprintable() and not set(name) & {"/", "\\"} and name == name.strip()
    if not plain or name[0] in ".-" or len(name.encode()) > _LONGEST_NAME:
        raise UserError(
            f"run_name: {name!r} is not a plain name: a folder's name alone, without / and \\, of at "
            f"most {_LONGEST_NAME} bytes, that begins with neither . nor -; logdir says where it is."
        )
    return Path(logdir).expanduser() / name


@contextlib.contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Turns an OSError within the context into a UserError: the run directory cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"logdir: cannot write to {run_dir} ({error.strerror}).") from error


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Makes a run directory that no other process writes to within the context.

    Raises UserError that names the holder's process and host if there is one. The lock is flock's:
    the kernel ends it with the process, even after SIGKILL, and on a shared file system it holds
    between machines, as far as that passes locks on. A file that marks a lock by being there would
    outlive a process that was killed, and bar its resume.
    """
    lock, holder = run_dir / _LOCK, run_dir / _HOLDER
    with contextlib.ExitStack() as held:
        with writable(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(FileLock(lock).acquire(timeout=0))
            except Timeout as error:
                name = holder.read_text(errors="replace") if holder.exists() else "another process"
                raise UserError(
                    f"run_name: {run_dir} is in use by {name}; wait until that has ended, or choose "
                    "another run_name."
                ) from error
            for file in (lock, holder):  # who waits for a lock whose file is gone makes a new one
                held.callback(file.unlink, missing_ok=True)
            write_file(holder, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def record_start(run_dir: Path, facts: dict) -> None:
    """Adds to starts.jsonl how the run was started: command, versions, and `facts`."""
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "versions": versions(),
        **facts,
    }
    path = run_dir / STARTS
    with writing(path):
        write_lines(path, [*whole_lines(path), json.dumps(start)])


def read_metrics(run_dir: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl; raises UserError if there is none or one is damaged."""
    path, lines = run_dir / METRICS, []
    try:
        lines += map(json.loads, whole_lines(path))
    except ValueError as error:
        raise UserError(f"{path}, line {len(lines) + 1}: not JSON: {error}") from error
    if not lines:
        raise UserError(f"{path} is missing or empty; name the directory of a training run.")
    return lines


def drop_metrics_after(run_dir: Path, last: int, counter: str = "rollout") -> None:
    """Deletes damaged metrics, and metrics with `counter` past `last`, which a resumed run repeats."""
    path = run_dir / METRICS
    if not path.exists():
        return
    kept = []
    for line in whole_lines(path):
        with contextlib.suppress(ValueError):  # half a line that a machine that stopped left behind
            kept += [line] if json.loads(line)[counter] <= last else []
    with writing(path):
        write_lines(path, kept)
