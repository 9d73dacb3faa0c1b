"""A TCP connection of rank 0 to each other rank, beside those of the process group."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spo.errors import RunError

_CONNECT = 60.0  # seconds in which all processes must have found each other
_REPLY = 5.0  # seconds that a read or write may take


@dataclass
class Peer:
    """The other end of a connection; lines of text go both ways."""

    name: str  # "rank 1 (host, pid 123)"
    connection: socket.socket
    silence: float = 0.0  # seconds since it was heard, in which this process was awake
    unread: bytes = b""

    def read(self) -> list[str]:
        """The lines that have arrived; OSError where the connection is closed."""
        received = self.connection.recv(65536)
        if not received:
            raise ConnectionResetError
        self.silence = 0.0
        *lines, self.unread = (self.unread + received).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def read_line(self) -> str:
        """The first line, waiting for it; OSError where none comes."""
        while not (lines := self.read()):
            pass
        return lines[0]

    def say(self, text: str) -> None:
        """Send a line; OSError where the connection is closed."""
        self.connection.sendall(text.encode(errors="replace") + b"\n")


def own_name(rank: int) -> str:
    """This process, as the others name it."""
    return f"rank {rank} ({socket.gethostname()}, pid {os.getpid()})"


def connect_peers(rank: int, count: int, from_main: Callable[[Any], Any]) -> list[Peer]:
    """On rank 0 the other `count` - 1 ranks, on these rank 0; all call this together.

    `from_main` gives everywhere what rank 0 passes. RunError where they do not find each other.
    """
    if rank > 0:
        port, token = from_main(None)
        return [_join(rank, port, token)]
    with _listen() as listener:
        token = secrets.token_hex(16)
        from_main((listener.getsockname()[1], token))
        return _welcome(listener, token, count)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _welcome(listener: socket.socket, token: str, count: int) -> list[Peer]:
    """The connections of all who know the token."""
    found: dict[str, Peer] = {}
    give_up = time.monotonic() + _CONNECT
    while len(found) < count - 1:
        listener.settimeout(max(0.1, give_up - time.monotonic()))
        try:
            peer = Peer("", listener.accept()[0])
            peer.connection.settimeout(_REPLY)
            said, rank, peer.name = peer.read_line().split(" ", 2)
            if not secrets.compare_digest(said, token):
                raise ValueError("a stranger")
            peer.say(own_name(0))
            found[rank] = peer
        except (OSError, ValueError):
            if time.monotonic() > give_up:
                missing = [str(r) for r in range(1, count) if str(r) not in found]
                raise RunError(
                    f"no connection from rank {', '.join(missing)} to {own_name(0)} within "
                    f"{_CONNECT:.0f} s; the lines of those ranks say why."
                ) from None
    return list(found.values())


def _join(rank: int, port: int, token: str) -> Peer:
    """The connection to rank 0."""
    address = os.environ["MASTER_ADDR"]
    try:
        peer = Peer("", socket.create_connection((address, port), timeout=_CONNECT))
        peer.say(f"{token} {rank} {own_name(rank)}")
        peer.name = peer.read_line()
        peer.connection.settimeout(_REPLY)
    except OSError as error:
        raise RunError(
            f"{own_name(rank)} cannot reach rank 0 at {address}, port {port} ({error}): the machines "
            "of a run must let each other connect to any port."
        ) from error
    return peer
