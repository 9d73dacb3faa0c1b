"""Runs the processes of a training run to their end, and passes signals on to them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil

from spo.errors import FAILED, STOPPED
from spo.launch.exit_status import FILE_VARIABLE, handed_over, has_handlers

AT_ONCE = 128 + signal.SIGINT  # a second Ctrl-C, as shells say it
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def run_to_end(command: list[str], script: str) -> int:
    """The exit status of `command`, which runs `script` or starts the processes that do.

    SIGTERM and SIGINT reach the processes of `script`, as SIGTERM, so that they save and end by
    themselves; torchrun, if it got them, would kill these after 30 seconds. A second SIGINT kills
    everything at once.
    """
    with tempfile.TemporaryDirectory(prefix="spo_") as folder:
        return _Supervisor(command, script, Path(folder) / "exit_status").wait()


class _Supervisor:
    def __init__(self, command: list[str], script: str, status_file: Path) -> None:
        self.script, self.status_file = script, status_file
        self.is_training_itself = command[1] == script
        self.signals: list[int] = []
        self.asked = self.stopped_before_start = False
        self.child = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        # In a session of its own it does not get the terminal's Ctrl-C besides.
        self.child = subprocess.Popen(
            command,
            env=os.environ | {FILE_VARIABLE: str(status_file)},
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )
        if self.signals:
            self.stop()

    def on_signal(self, number: int, _frame: object) -> None:
        self.signals.append(number)
        if self.child is not None:
            self.stop()

    def stop(self) -> None:
        """Ask the training processes to end, or at the second SIGINT kill everything."""
        processes = self.training_processes()
        self.stopped_before_start |= not processes and not self.asked
        if self.stopped_before_start or self.signals.count(signal.SIGINT) > 1:
            self.kill()
            return
        self.asked = True
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()

    def training_processes(self) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.child.pid)
            candidates = [root] if self.is_training_itself else root.children()
            for process in candidates:
                with contextlib.suppress(psutil.Error):
                    found += [process] if self.script in process.cmdline() else []
        return found

    def kill(self) -> None:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.child.pid)
            root.suspend()  # it must not start others meanwhile
            for process in (*root.children(recursive=True), root):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def wait(self) -> int:
        """The exit status of the run, once the child has ended."""
        status = self.child.wait()
        if self.signals.count(signal.SIGINT) > 1:
            print("error: killed by the second interrupt; nothing was saved", file=sys.stderr)
            return AT_ONCE
        ended_early = status and self.signals and not has_handlers(self.status_file)
        if self.stopped_before_start or ended_early:
            print("stopped before training began", file=sys.stderr)
            return STOPPED
        if status < 0:
            name = signal.Signals(-status).name
            print(f"error: the training process was killed by {name}", file=sys.stderr)
            return FAILED
        return status or handed_over(self.status_file)


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux what makes a child get SIGTERM when this process is killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # found before the fork, after which little is safe
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
