"""Publish the LoRA of a run on the Hugging Face Hub, with a model card.

    python scripts/push_to_hub.py runs/NAME --repo_id user/name
    python scripts/push_to_hub.py runs/NAME --repo_id user/name --subfolder sd1_5 --dry_run

What is not given is taken from config.hub of the run. Several runs share a repo by their subfolders.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from spo.command_line.flags import exit_on_user_error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, help="directory of the run")
    parser.add_argument("--repo_id", help="repo on the Hub, user/name; made where it is missing")
    parser.add_argument("--subfolder", help="folder in the repo, e.g. sd1_5 (the root)")
    parser.add_argument("--weights", choices=("policy", "ema"), help="which LoRA (policy)")
    parser.add_argument("--private", action="store_true", default=None, help="for a new repo")
    parser.add_argument("--branch", help="branch to push to, made where it is missing (main)")
    parser.add_argument("--license", help="licence in the card (that of SD1.5 or SDXL 1.0)")
    parser.add_argument("--message", default="", help="commit message (what is pushed)")
    parser.add_argument(
        "--results", type=Path, help="folder of an evaluation (every evaluation* of the run)"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="write RUN_DIR/hub and print the card; no network"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with exit_on_user_error():
        publish(args)


def publish(args: argparse.Namespace) -> None:
    """Write RUN_DIR/hub, and push it unless it is a dry run."""
    from spo.hub import Destination
    from spo.method import build
    from spo.publish.layout import CARD, stage
    from spo.publish.push import check_destination, check_token, push
    from spo.publish.record import read_config

    given = {field.name: getattr(args, field.name) for field in fields(Destination)}
    to = replace(
        build.destination(read_config(args.run_dir)),
        **{name: value for name, value in given.items() if value is not None},
    )
    check_destination(to, "--")
    if not args.dry_run:
        check_token("--")
    staged = stage(args.run_dir, to, args.results)
    if args.dry_run:
        print((staged.folder / CARD).read_text(encoding="utf-8"))
        print(f"written, and not pushed: {staged.folder}")
        return
    print(push(staged, to, "--", args.message))


if __name__ == "__main__":
    main()
