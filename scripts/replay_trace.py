"""Replays recordings of the official code through the functions that training calls.

    cd tests/data/golden
    python ../../../scripts/replay_trace.py --trace gradspo_sd15 --models models

Prints the largest absolute deviation of every quantity in every rollout, and exits with status 1 if one
is past its tolerance: a table on a terminal; one JSON object into a file or pipe, or with --json.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from spo.command_line.values import path
from spo.method.replay import replay_trace
from spo.preference.replay import replay_latent_reward
from spo.run.tables import markdown_table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=path, required=True, help="folder with meta.json")
    parser.add_argument("--models", type=path, required=True, help="folder of the trace's models")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object, on a terminal too")
    options = parser.parse_args()
    report = replay(options.trace, options.models, torch.device(options.device))
    as_json = options.json or not sys.stdout.isatty()
    print(json.dumps(report) if as_json else table(report))
    return 1 if report["failures"] else 0


def replay(trace: Path, models: Path, device: torch.device) -> dict:
    """Replays rollouts and training, or the scores or the training of a reward model."""
    meta = json.loads((trace / "meta.json").read_text())
    return (replay_trace if "rollouts" in meta else replay_latent_reward)(trace, models, device)


def table(report: dict) -> str:
    """Returns the report of a replay as a table, a row for each quantity, and its failures."""
    failed = {line.split(": ")[1].split()[0] for line in report["failures"]}
    parts = report.get("cases") or {f"rollout {i}": r for i, r in enumerate(report["rollouts"])}
    rows = []
    for name in next(iter(parts.values())):
        values = [deviations[name] for deviations in parts.values()]
        shown = ["unlike" if value is None else f"{value:.1e}" for value in values]
        rows.append((name, *shown, "FAIL" if name in failed else "pass"))
    header = (report["trace"], *parts, "")
    return "\n".join([markdown_table(header, rows), *report["failures"]])


if __name__ == "__main__":
    sys.exit(main())
