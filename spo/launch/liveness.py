"""Every process of a run hears of the death or failure of any other, and stops.

A collective waits for a process that is gone, with NCCL until the group's timeout. So rank 0 and each
other rank tell each other from a thread that they are there. A connection that closes without a
goodbye is a process that died; one that stays silent, a process that hangs or a machine that is gone.
Rank 0 decides what the cause was and tells all.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time

from spo.launch.peers import Peer, own_name

_TICK = 0.2  # seconds between signs of life
_AWAKE = 1.0  # seconds between two of them at which a process counts as running
_SETTLE = 1.0  # seconds that rank 0 waits for a cause that may reach it after its consequences
_VERDICT = 5.0  # seconds that a failing process waits to hear whether another failed before it

_ALIVE, _LEFT, _FAILED = "alive", "left", "failed "


class Liveness:
    """Watches the peers from a thread: on rank 0 all other ranks, on these rank 0.

    `timeout` (seconds) is how long a peer may be silent. That is longer than any call that keeps
    Python's interpreter lock, which keeps the thread from speaking.
    """

    def __init__(self, rank: int, peers: list[Peer], timeout: int) -> None:
        self._name, self._decides, self._timeout = own_name(rank), rank == 0, timeout
        self._peers, self._watched = peers, list(peers)
        self._leaving, self._failure = False, ""
        self._causes: list[tuple[int, str]] = []  # 0 for a death, 1 for an error; what happened
        self._decide_at = float("inf")
        self._listened = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """This process ends in good order: the others need not mind."""
        self._leaving = True
        self._thread.join(_VERDICT)

    def fail(self, reason: str) -> None:
        """This process ends of `reason`, and so do the others.

        Does not return where another failed before it, and that was the reason.
        """
        self._failure = f"{self._name}: {reason}"
        self._thread.join(_VERDICT)

    def _run(self) -> None:
        reported = False
        while not self._leaving:
            time.sleep(_TICK)
            self._listen()
            if self._failure and not reported:
                reported = True
                self._report(self._failure)
            if time.monotonic() >= self._decide_at:
                cause = min(self._causes, key=lambda known: known[0])[1]
                self._tell(_FAILED + cause)
                if cause == self._failure:
                    return  # the exception goes its way
                _stop(cause)
            self._tell(_ALIVE)
        self._tell(_LEFT)

    def _listen(self) -> None:
        now = time.monotonic()
        # If this process did not get to run, the others may be paused too, and silent for that.
        awake = min(now - self._listened, _AWAKE)
        self._listened = now
        connections = [peer.connection for peer in self._watched]
        ready = select.select(connections, [], [], 0)[0]
        for peer in list(self._watched):
            peer.silence += awake
            try:
                for line in peer.read() if peer.connection in ready else []:
                    self._obey(peer, line)
            except OSError:
                self._lose(peer, f"{peer.name} ended without a word: it crashed or was killed")
            if peer.silence > self._timeout:
                self._lose(peer, f"{peer.name} has not been heard of for {self._timeout} s")

    def _obey(self, peer: Peer, line: str) -> None:
        if line == _LEFT:
            self._watched.remove(peer)
        elif line.startswith(_FAILED):
            self._watched.remove(peer)
            self._add_cause(1, line.removeprefix(_FAILED))

    def _lose(self, peer: Peer, cause: str) -> None:
        if peer in self._watched:
            self._watched.remove(peer)
            self._add_cause(0, cause)

    def _report(self, failure: str) -> None:
        if self._decides:
            self._add_cause(1, failure)
        else:
            self._tell(_FAILED + failure)

    def _add_cause(self, kind: int, cause: str) -> None:
        """Of several, a death comes first: it makes the collectives of the others fail."""
        self._causes.append((kind, cause))
        wait = _SETTLE if self._decides else 0.0
        self._decide_at = min(self._decide_at, time.monotonic() + wait)

    def _tell(self, text: str) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):  # reading from it tells
                peer.say(text)


def _stop(cause: str) -> None:
    """End this process, whatever its main thread waits for, with a line below its progress bars."""
    time.sleep(_TICK)  # its end breaks the connections: what was said must have arrived
    try:
        print(
            f"\nerror: {cause}; this run stops, and goes on from its last checkpoint by "
            "--config.run_name=NAME --config.resume_from=auto",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
    finally:
        os._exit(1)
