"""Writes report.html of a training run or an evaluation: one file to look at and to send round.

    python scripts/report.py runs/NAME

A training run (of the method, or of a preference model): curves, validation images, config. An
evaluation, a folder with results.json: comparison, figures, images side by side.
"""

import argparse
import shlex
from pathlib import Path

from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import path
from spo.errors import UserError
from spo.run.folder import CONFIG, RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dir", type=path)
    parser.add_argument(
        "--max_prompts",
        type=int,
        default=500,
        help="of an evaluation: if it has more, shows those with the largest gains and losses "
        "(%(default)s)",
    )
    options = parser.parse_args()
    with exit_on_user_error():
        print(report(options.dir, options.max_prompts))


def report(folder: Path, max_prompts: int) -> Path:
    """Writes the report of the evaluation or the run in `folder`."""
    from spo.evaluation import results
    from spo.evaluation.report import write_report
    from spo.evaluation.run_report import write_run_report

    if max_prompts < 1:
        raise UserError(f"--max_prompts: {max_prompts} is less than 1.")
    if (folder / RESULTS).exists():
        return write_report(folder, results.read_results(folder), max_prompts)
    if (folder / "prompts.json").exists():
        command = f"python scripts/evaluate.py --config={shlex.quote(str(folder / CONFIG))}"
        raise UserError(
            f"{folder} is an evaluation that has no results yet; `{command} --config.run_name="
            f"{shlex.quote(folder.resolve().name)}` finishes it."
        )
    return write_run_report(folder)


if __name__ == "__main__":
    main()
