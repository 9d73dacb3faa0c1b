"""Compares a run's numbers with what its config leads to expect, and says what to look at first.

    python scripts/check_run.py runs/NAME
    python scripts/check_run.py wandb_export.csv --config=config/sdxl.py

RUN is a run directory, of a finished run or one in progress, or a .csv, .json or .jsonl file with the
numbers of other code with this method, such as wandb's export of an official run. docs/healthy_runs.md
explains the table. It informs: the exit status is 0 whatever it finds.
"""

import argparse

from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=path, metavar="RUN")
    parser.add_argument(
        "--config", help="whose values count (default: the run's own; of a file, config/sd15.py)"
    )
    options = parser.parse_args()
    with exit_on_user_error():
        from spo.guard.checks import describe
        from spo.guard.log import open_log

        print(describe(open_log(options.run, options.config)))


if __name__ == "__main__":
    main()
