"""Runs every check on this machine's GPU, or at tiny size on its CPU, and writes a report.

    python -m spo.gpu_check [--cpu] [--out DIR] [--seconds N] [--only NAME ...]

Prints a line for each check as it ends. A check has a process and a time limit of its own, and its
failure stops no other. Writes gpu_report.json and gpu_report.md into the folder, and each check's log.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

from spo.gpu_check.checks import Check, Place, all_checks
from spo.run.tables import markdown_table

PASSED, FAILED, TIMED_OUT, LEFT_OUT = "passed", "failed", "timed out", "left out"
COMMAND = (sys.executable, "-m", "spo.gpu_check")
LEAST = 15  # seconds without which no check begins


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu_check"), help="folder of the report"
    )
    parser.add_argument("--seconds", type=float, default=3600, help="limit of all checks together")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="checks or groups")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one check, in this process
    options = parser.parse_args()
    place = Place("cpu" if options.cpu else "cuda", options.out, options.run or "")
    if options.run:
        return run_here(options.run, place)
    checks = [c for c in all_checks() if not options.only or {c.name, c.group} & {*options.only}]
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.time() + options.seconds
    results: dict[str, Any] = {}
    cores = os.cpu_count() or 2
    for _, members in groupby(checks, lambda check: check.group):
        group = list(members)
        side_by_side = min(len(group), 2 if options.cpu else max(1, cores - 1))
        if options.cpu:  # more threads than cores wait for each other, up to 40 times as long
            os.environ["OMP_NUM_THREADS"] = str(max(1, cores // side_by_side))
        with ThreadPoolExecutor(side_by_side) as pool:
            for name, result in pool.map(lambda check: run_check(check, place, ends), group):
                results[name] = result
        write_report(options.out, results)
    return int(any(result["status"] != PASSED for result in results.values()))


def run_here(name: str, place: Place) -> int:
    """Runs one check in this process and writes its figures; 1 if it found failures."""
    check = next(check for check in all_checks() if check.name == name)
    figures = check.run(place)
    place.file(name).write_text(json.dumps(figures, indent=1))
    return int(bool(figures["failures"]))


def run_check(check: Check, place: Place, ends: float) -> tuple[str, dict[str, Any]]:
    """Runs a check in a process of its own and prints its line; returns its name and its result."""
    limit = 600 if place.small else check.seconds  # a CPU takes its time
    limit, began = min(limit, ends - time.time()), time.time()
    if limit < LEAST:
        status, figures = LEFT_OUT, {}
    else:
        command = [*COMMAND, "--run", check.name, "--out", str(place.out)]
        command += ["--cpu"] if place.small else []
        file = place.file(check.name)
        file.unlink(missing_ok=True)
        log = file.with_suffix(".log")
        status = call(command, log, limit)
        # Of a check that did not end: what it had found.
        figures = json.loads(file.read_text()) if file.is_file() else {}
        if status != PASSED and not figures.get("failures"):
            figures["tail"] = log.read_text().strip()[-2000:]
    seconds = time.time() - began
    failures = [*figures.get("failures", []), figures.get("tail", "").rpartition("\n")[2]]
    text = "; ".join(filter(None, [*failures, figures.get("summary")]))
    print(f"{check.name:22} {status:9} {seconds:5.0f} s  {text[:300]}", flush=True)
    return check.name, {"status": status, "seconds": seconds, **figures}


def call(command: Sequence[str], log: Path, limit: float) -> str:
    """Runs a command and all that it starts, until `limit` seconds are over."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return FAILED if process.wait(limit) else PASSED
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return TIMED_OUT


def write_report(out: Path, results: dict[str, Any]) -> None:
    """Writes what has been found so far."""
    (out / "gpu_report.json").write_text(json.dumps(results, indent=1))
    rows = [
        (n, r["status"], f"{r['seconds']:.0f} s", r.get("summary", "")) for n, r in results.items()
    ]
    table = markdown_table(("check", "result", "time", "found"), rows)
    (out / "gpu_report.md").write_text(f"{table}\n")


if __name__ == "__main__":
    sys.exit(main())
