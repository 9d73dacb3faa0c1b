"""Runs the processes of a script to their end; signals stop them after they saved."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock

from spo.command_line.flags import ERROR_LENGTH, LAUNCHER_VARIABLE, is_orphan
from spo.errors import FAILED, STOPPED, RunError, Stopped, UserError, in_one_line

if TYPE_CHECKING:  # torch takes seconds to load, and one process does not need it here
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_TEMPORARY = "spo_launch_"  # begins the name of a launcher's folder
_LOCK = ".lock"  # a file in it, which the launcher has locked
_KINDS = {kind.__name__: kind for kind in (UserError, RunError, Stopped)}


@dataclass(frozen=True)
class World:
    """The processes of a run, as seen from one of its machines."""

    processes: int  # on all machines
    here: int  # on this one
    machines: int = 1
    machine_rank: int = 0
    address: str = "localhost"  # of the first machine
    port: int = 0  # of the first machine; 0: any free one


def run_processes(command: list[str], world: World) -> int:
    """Runs `command` in the processes of `world` and returns the exit status of the run.

    SIGTERM and SIGINT reach every process as SIGTERM; a second SIGINT kills all of them.
    """
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    relay = _Relay()
    return _run_many(command, world, relay) if world.processes > 1 else _run_one(command, relay)


class _Relay:
    """Passes SIGTERM and SIGINT on to the children of this process, as SIGTERM."""

    def __init__(self) -> None:
        self.received: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.received.append(number))

    def attend(self, work: Callable[[], Any]) -> Any:
        """Returns the result of `work()`, which starts the children and awaits them in a thread.

        In the main thread torch would install handlers that kill the children after 30 seconds.
        """
        told = set()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            while not future.done():
                wait([future], timeout=0.1)
                children = set(psutil.Process().children()) if self.received else set()
                if self.received.count(signal.SIGINT) > 1:
                    for child in psutil.Process().children(recursive=True):
                        with contextlib.suppress(psutil.Error):
                            child.kill()
                    sys.stderr.write("error: killed by the second interrupt; nothing was saved\n")
                    os._exit(128 + signal.SIGINT)  # as in a shell
                for child in children - told:
                    with contextlib.suppress(psutil.Error):
                        child.terminate()
                told |= children
            return future.result()


def _run_one(command: list[str], relay: _Relay) -> int:
    process = subprocess.Popen(command, start_new_session=True)
    status = relay.attend(process.wait)
    if status >= 0:
        return status
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure  # slow

    return _tell({0: ProcessFailure(0, process.pid, status, "")}, bool(relay.received))


def _run_many(command: list[str], world: World, relay: _Relay) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # torch's report; _tell has a shorter one
    meeting = {"rdzv_backend": "c10d", "local_addr": "localhost"}
    if world.machines > 1:
        meeting = {"rdzv_backend": "static", "rdzv_configs": {"rank": world.machine_rank}}
    with _temporary_folder() as folder:
        config = LaunchConfig(
            min_nodes=world.machines,
            max_nodes=world.machines,
            nproc_per_node=world.here,
            run_id="spo",  # the same on all machines
            rdzv_endpoint=f"{world.address}:{world.port}",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            **meeting,
        )
        python, *arguments = command
        try:
            relay.attend(lambda: elastic_launch(config, python)("-u", *arguments))
        except ChildFailedError as error:
            return _tell(error.failures, bool(relay.received))
    return 0


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """Yields a folder for torch, and deletes those of launchers that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*/{_LOCK}"):
        with contextlib.suppress(OSError), FileLock(left).acquire(timeout=0):
            shutil.rmtree(left.parent)
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY) as folder, FileLock(f"{folder}/{_LOCK}"):
        yield folder


def _tell(failures: dict[int, ProcessFailure], stopping: bool) -> int:
    """Prints why a run ended, of its first failure, and returns the exit status."""
    codes = {failure.exitcode for failure in failures.values()}
    if stopping and -signal.SIGTERM in codes and STOPPED not in codes:
        print("stopped outside of training; nothing is lost", file=sys.stderr)
        return STOPPED
    rank, first = min(failures.items(), key=lambda item: _order(item[1]))
    message, trace = "", ""
    if isinstance(first.message, dict):
        message, trace = first.message["message"], first.message["extraInfo"]["py_callstack"]
    kind, _, text = message.partition(": ")
    if kind in _KINDS:
        print(f"{_KINDS[kind].label}: {in_one_line(text, ERROR_LENGTH)}", file=sys.stderr)
        return first.exitcode
    reason = in_one_line(message or "no error is known", ERROR_LENGTH)
    end = f"failed (exit code {first.exitcode}): {reason}"
    if first.exitcode < 0:
        end = f"was killed by {first.signal_name()}"
    print(  # below a progress bar
        f"\n{trace}error: rank {rank} ({socket.gethostname()}, pid {first.pid}) {end}; this run stops, "
        "and resumes from its last checkpoint by --config.run_name=NAME --config.resume_from=auto",
        file=sys.stderr,
    )
    return max(first.exitcode, FAILED)


def _order(failure: ProcessFailure) -> tuple[bool, float]:
    """Returns the sort key that puts the cause of all failures first.

    torch ends the other processes by SIGTERM; an abort or a lost connection follows from a failure.
    A death is noted in whole seconds, and after the errors that it caused.
    """
    follows = failure.exitcode in (-signal.SIGTERM, -signal.SIGABRT)
    if os.path.exists(failure.error_file):
        return follows, os.stat(failure.error_file).st_mtime
    return follows, failure.timestamp - 1


class StopSignals:
    """A context in which SIGTERM and SIGINT only ask a process of the run to stop.

    A second SIGINT kills at once. The death of the launcher asks, too. Each process gets its own
    signals, so the processes of a run must agree before they stop.
    """

    def __init__(self) -> None:
        self._signalled = False

    @property
    def requested(self) -> bool:
        """True if a stop was asked for."""
        return self._signalled or is_orphan()

    def __enter__(self) -> StopSignals:
        both = signal.SIGTERM, signal.SIGINT
        self._before = {number: signal.signal(number, self._note) for number in both}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if self.requested:
            raise Stopped("by a signal.")

    def watch(self, items: Iterable) -> Iterator:
        """Yields `items`, with a check before each."""
        for item in items:
            self.check()
            yield item
