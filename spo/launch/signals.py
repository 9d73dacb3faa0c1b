"""SIGTERM and SIGINT: a run stops where nothing that it computed is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from spo.errors import Stopped
from spo.launch.exit_status import note_handlers

Item = TypeVar("Item")


class StopSignals:
    """Within the context, SIGTERM and SIGINT only ask for a stop; a second SIGINT kills at once.

    Signals are this process's own: the processes of a run have to agree on what follows from one.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python refuses it elsewhere
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
            note_handlers()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self) -> None:
        """Raise Stopped where a stop was asked for."""
        if self.requested:
            raise Stopped("by a signal.")

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, with a check before each."""
        for item in items:
            self.check()
            yield item
