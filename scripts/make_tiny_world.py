"""Makes the tiny world from nothing: base model, tiny decoder, preference data, preference model.

    python scripts/make_tiny_world.py [--out runs/tiny_world] [--install]

Two cores take about two hours at most. Every stage is kept in `--out`; the command given again
continues with the first stage that is missing. `--install` copies the weights and data that users start
from to assets/tiny.
"""

import argparse
from pathlib import Path

from spo.atomic import naming
from spo.command_line.config_files import REPO_ROOT
from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import path
from spo.tiny_world.make import install, make_world


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=path, default=Path("runs/tiny_world"))
    parser.add_argument("--install", action="store_true", help="copy the results to assets/tiny")
    parser.add_argument(
        "--shorten", type=int, default=1, help="divide all steps and data by this, to try it out"
    )
    options = parser.parse_args()
    with exit_on_user_error(), naming(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        make_world(options.out, options.shorten)
        if options.install:
            install(options.out, REPO_ROOT / "assets" / "tiny")


if __name__ == "__main__":
    main()
