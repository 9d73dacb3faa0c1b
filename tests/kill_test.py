"""Kills tiny runs again and again, resumes them, and compares them with one that was left alone.

python -m tests.kill_test [--kills 50] [--processes 1] [--seed 0]

Prints a line per kill. Exit status 1 where a run that was killed ends with other weights, images or
metrics than the run that was not, or where a run directory cannot be gone on with.
"""

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# Before torch loads: kills hit what trains, and one thread sums in one order.
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

from spo.atomic import PARTIAL
from spo.errors import Stopped
from spo.run.checkpoint_folder import checkpoints, find_fault
from spo.run.folder import CHECKPOINTS, STARTS
from tests import small_runs

# A kill is drawn as one of these; a run has a rollout, minibatches and a checkpoint every second.
KINDS = ("any moment", "any moment", "checkpoint", "after SIGTERM")
LIMIT = 240  # seconds after which a run hangs
CHANGES = {"prompts__num": 6, "save_every_rollouts": 1, "checkpoint_limit": 2}


@dataclass(frozen=True)
class Kill:
    """One line of the table."""

    kind: str
    seconds: float  # since the process began
    on_disk: str
    resumed_from: str


class Run:
    """A run of `processes` processes that are the real trainer."""

    def __init__(self, logdir: Path, name: str, processes: int) -> None:
        self.folder, self.processes = logdir / name, processes
        self.ids: list[int] = []
        self.terminated = False  # SIGTERM was sent

    def start(self) -> None:
        """Start or resume it, forked from this process, which has the libraries loaded."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ids, self.terminated = [], False
        for rank in range(self.processes):
            pid = os.fork()
            if pid == 0:
                self._train(rank, port)
            self.ids.append(pid)

    def _train(self, rank: int, port: int) -> None:
        status = 1
        try:
            if self.processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"WORLD_SIZE": str(self.processes), "MASTER_PORT": str(port)}
                os.environ["MASTER_ADDR"] = "127.0.0.1"
            log = os.open(f"{self.folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            small_runs.run(self.folder, **CHANGES)
            status = 0
        except Stopped as stopped:
            print(f"stopped: {stopped}")
            status = stopped.exit_status
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def running(self) -> bool:
        """Whether a process of it is left; RuntimeError where one failed."""
        for pid in tuple(self.ids):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            self.ids.remove(pid)
            # SIGTERM may come before a process listens to it: that ends the others, too.
            if status and not self.terminated:
                self.kill()
                raise RuntimeError(f"a process of {self.folder} failed; see {self.folder}.log")
        return bool(self.ids)

    def terminate(self) -> None:
        """Ask all its processes to stop."""
        self.terminated = True
        for pid in self.ids:
            os.kill(pid, signal.SIGTERM)

    def kill(self) -> bool:
        """End all its processes at once; whether there were any."""
        killed, self.ids = self.ids, []
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        for pid in killed:
            os.waitpid(pid, 0)
        return bool(killed)

    def is_complete(self) -> bool:
        """Whether the processes ended because there was nothing left to do."""
        complete = self.folder / "pytorch_lora_weights.safetensors"
        return not self.ids and not self.terminated and complete.exists()

    def partial(self) -> list[str]:
        """What lies there incomplete."""
        # os.walk, since what it walks over comes and goes.
        names = {name for _, *found in os.walk(self.folder) for name in sum(found, [])}
        return sorted(name for name in names if name.endswith(PARTIAL))

    def wait(self, until=lambda: False, seconds: float = LIMIT) -> bool:
        """Wait for the end, `until`, or so many seconds; whether it still runs."""
        end = time.monotonic() + seconds
        while self.running() and not until() and time.monotonic() < end:
            time.sleep(0.001)
        return bool(self.ids)


def disturb(run: Run, kind: str, draw: random.Random, length: float) -> Kill | None:
    """Start or resume `run`, and kill it at a moment of this `kind`; None where it ended before."""
    before, started = starts(run.folder), time.monotonic()
    run.start()
    if kind == "checkpoint":
        for _ in range(draw.randint(1, 3)):
            run.wait(until=lambda: not run.partial())
            run.wait(until=run.partial)
        run.wait(seconds=draw.uniform(0, 0.03))
    else:
        run.wait(seconds=draw.uniform(0, length))
    if kind == "after SIGTERM" and run.ids:
        run.terminate()
        run.wait(seconds=draw.uniform(0, 0.3))
    if not run.kill():
        return None
    found = [p.name for p in checkpoints(run.folder)]
    on_disk = ", ".join([*found[-1:], *run.partial()]) or "nothing"
    new = starts(run.folder)[len(before) :]
    resumed_from = new[0] or "nothing" if new else "(killed before)"
    return Kill(kind, time.monotonic() - started, on_disk, resumed_from)


def finish(run: Run) -> None:
    """Start or resume `run` and leave it alone; RuntimeError where it does not end well."""
    run.start()
    run.wait()
    if run.kill() or not run.is_complete():
        raise RuntimeError(f"{run.folder} does not end; see {run.folder}.log")


def starts(folder: Path) -> list[str]:
    """The checkpoint that each start of a run went on from; "" for none."""
    path = folder / STARTS
    lines = path.read_text().splitlines() if path.exists() else []
    return [Path(json.loads(line)["resumed_from"]).name for line in lines]


def differences(whole: Path, other: Path) -> list[str]:
    """The results in which two finished runs differ, and checkpoints that are damaged."""
    damaged = [f"{CHECKPOINTS}/{f.name}" for f in checkpoints(other) if find_fault(f)]
    return small_runs.differences(whole, other) + damaged


def torture(logdir: Path, kills: int, processes: int, seed: int) -> int:
    """Kill runs so many times, and return how many ended otherwise than one left alone."""
    draw, different, done, number = random.Random(seed), 0, 0, 0
    whole = Run(logdir, "whole", processes)
    started = time.monotonic()
    finish(whole)
    length = time.monotonic() - started
    print(f"{processes} process(es), {length:.1f} s undisturbed")
    print(
        f"{'kill':>4} {'run':>3} {'when':13} {'after':>6}  {'on disk':75} this start resumed from"
    )
    while done < kills:
        number += 1
        run = Run(logdir, f"run_{number}", processes)
        while done < kills and not run.is_complete():
            kill = disturb(run, draw.choice(KINDS), draw, length)
            if kill is None:
                continue
            done += 1
            print(
                f"{done:4} {number:3} {kill.kind:13} {kill.seconds:5.2f}s  {kill.on_disk:75} "
                f"{kill.resumed_from}",
                flush=True,
            )
        if not run.is_complete():
            finish(run)
        found = differences(whole.folder, run.folder)
        different += bool(found)
        print(f"run {number} complete; differences: {', '.join(found) or 'none'}", flush=True)
    print(f"{done} kills, {number} runs, {different} of them different at the end")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.chdir(small_runs.ROOT)
    logdir = Path(tempfile.mkdtemp(prefix="spo_kill_test_"))
    try:
        different = torture(logdir, options.kills, options.processes, options.seed)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    if different:
        sys.exit(f"error: the runs are kept in {logdir}")


if __name__ == "__main__":
    main()
