"""Checks of a machine that go as the test of their runner needs them to."""

import json
import sys
import time

from spo.gpu_check import __main__ as runner
from spo.gpu_check.checks import Check


def fails(place):
    """Fails after some of its figures are there."""
    place.file(place.name).write_text(json.dumps({"summary": "half of it", "failures": []}))
    raise RuntimeError("a kernel is missing")


def finds_fault(place):
    return {"summary": "done", "failures": ["7 values are not finite"]}


def hangs(place):
    time.sleep(600)


def passes(place, argument):
    return {"summary": argument, "failures": []}


def check(name, function, seconds=60, **options):
    return Check(name, f"tests.checks_for_tests:{function}", name, seconds, **options)


CHECKS = [
    check("a", "fails"),
    check("b", "finds_fault"),
    check("c", "hangs", seconds=16),
    check("d", "passes", arguments=("as said",)),
]


if __name__ == "__main__":
    runner.all_checks, runner.COMMAND = (
        lambda: CHECKS,
        (sys.executable, "-m", "tests.checks_for_tests"),
    )
    sys.exit(runner.main())
