"""Shows the paper's claims in miniature: every arm of the table, several seeds each, on the tiny world.

    python scripts/reproduce_tiny.py --quick        # the main arms: 35 minutes on two cores
    python scripts/reproduce_tiny.py                # every arm
    python scripts/reproduce_tiny.py --curves       # pixels against latents, by what a gain costs
    python scripts/reproduce_tiny.py --healthy      # a good run and four others, docs/healthy_runs.md
    python scripts/reproduce_tiny.py --verdicts     # do runs know when to stop? docs/healthy_runs.md

Each (arm, seed) is a run under `--out`, which is kept: the command given again continues where it
stopped. Writes results.json there, or curves.json and curves.png, or healthy_runs.png, and prints the
table.
"""

import argparse
import os
from pathlib import Path

from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import path
from spo.tiny_world.curves import ARMS as CURVES
from spo.tiny_world.curves import compare_costs
from spo.tiny_world.healthy import RUNS, show_runs
from spo.tiny_world.reproduce import ARMS, QUICK, STUDENT, reproduce
from spo.tiny_world.verdicts import RUNS as JUDGED
from spo.tiny_world.verdicts import compare_verdicts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=path, default=Path("runs/reproduce_tiny"))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="only these")
    parser.add_argument("--curves", action="store_true", help=f"{', '.join(CURVES)} by their costs")
    parser.add_argument("--healthy", action="store_true", help=f"{', '.join(RUNS)}: one seed each")
    parser.add_argument("--verdicts", action="store_true", help=f"of runs: {', '.join(JUDGED)}")
    parser.add_argument("--seeds", type=int, default=5, choices=STUDENT)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    arms = options.arms or (QUICK if options.quick else tuple(ARMS))
    runs = (options.seeds, options.out, options.processes)
    with exit_on_user_error():
        if options.healthy:
            print(show_runs(options.out, options.processes))
            return
        if options.verdicts:
            print(compare_verdicts(*runs))
            return
        print(compare_costs(*runs) if options.curves else reproduce(arms, *runs))


if __name__ == "__main__":
    main()
