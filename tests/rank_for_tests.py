"""One process of a run, as far as liveness goes: does what test_liveness.py writes to its stdin.

rank_for_tests.py RANK COUNT TIMEOUT FOLDER
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

from spo.launch.liveness import Liveness
from spo.launch.peers import connect_peers

rank, count, timeout = map(int, sys.argv[1:4])
shared = Path(sys.argv[4]) / "from_main.json"


def from_main(value):
    """What Workers.from_main does, without torch."""
    if rank == 0:
        partial = shared.with_suffix(".partial")
        partial.write_text(json.dumps(value))
        partial.replace(shared)
    while not shared.exists():
        time.sleep(0.01)
    return json.loads(shared.read_text())


os.environ["MASTER_ADDR"] = "127.0.0.1"
liveness = Liveness(rank, connect_peers(rank, count, from_main), timeout)
print("ready", flush=True)
# While it waits here the main thread is as deaf as in a collective.
for line in sys.stdin:
    command, _, argument = line.strip().partition(" ")
    if command == "fail":
        liveness.fail(argument)
        sys.exit(3)
    elif command == "hold":  # the interpreter lock, for so many seconds
        ctypes.PyDLL(None).sleep(int(argument))
    elif command == "leave":
        liveness.leave()
        sys.exit(0)
