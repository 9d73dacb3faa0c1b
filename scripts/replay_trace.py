"""Replays a recorded run of the official code through the functions that training calls.

    cd tests/data/golden
    python ../../../scripts/replay_trace.py --trace gradspo_sd15 --models models

Prints one JSON object with the largest absolute deviation of every quantity in every rollout, and
exits with status 1 if one is past its tolerance.
"""

import argparse
import json
import sys

from spo.command_line.values import path
from spo.method.replay import replay_trace


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=path, required=True, help="folder with meta.json")
    parser.add_argument("--models", type=path, required=True, help="folder of the trace's models")
    options = parser.parse_args()
    report = replay_trace(options.trace, options.models)
    print(json.dumps(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
