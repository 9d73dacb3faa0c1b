"""SIGTERM and SIGINT stop a run at a point at which it can save all that it computed."""

import signal
import threading
from collections.abc import Iterable, Iterator

from spo.errors import Stopped


class StopSignals:
    """A context in which SIGTERM and SIGINT only ask for a stop; a second SIGINT kills at once.

    Each process gets its own signals, so the processes of a run must agree before they stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python refuses it elsewhere
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
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
