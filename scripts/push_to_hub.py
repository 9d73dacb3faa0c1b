"""Publishes the LoRA of a run on the Hugging Face Hub, with a model card.

    python scripts/push_to_hub.py runs/NAME --repo_id user/name
    python scripts/push_to_hub.py runs/NAME --repo_id user/name --subfolder sd1_5 --dry_run
    python scripts/push_to_hub.py runs/NAME --repo_id user/name --checkpoint best

The default of each option is that of config.hub of the run. Several runs share a repo by subfolders.
"""

import argparse

from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import path


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=path, help="directory of the run")
    parser.add_argument("--repo_id", help="repo on the Hub, user/name; made if missing")
    parser.add_argument("--subfolder", help="folder in the repo, e.g. sd1_5 (the root)")
    parser.add_argument("--weights", choices=("policy", "ema"), help="which LoRA (policy)")
    parser.add_argument(
        "--checkpoint", help="best, or a folder of RUN_DIR/checkpoints (the weights as they are)"
    )
    parser.add_argument("--private", action="store_true", default=None, help="for a new repo")
    parser.add_argument("--branch", help="branch to push to, made if missing (main)")
    parser.add_argument(
        "--license", help="licence in the card (the base model's, of SD1.5 and SDXL 1.0)"
    )
    parser.add_argument("--message", default="", help="commit message (default: weights and epoch)")
    parser.add_argument(
        "--results",
        type=path,
        help="folder of an evaluation (every evaluation* of the run; of a checkpoint, none)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="write RUN_DIR/hub and print the card; no network"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = vars(parse_args(argv))
    others = [args.pop(name) for name in ("results", "message", "dry_run")]
    run_dir = args.pop("run_dir")
    destination = {name: value for name, value in args.items() if value is not None}
    with exit_on_user_error():
        from spo.publish.push import publish_run  # a bad command line fails before torch loads

        print(publish_run(run_dir, destination, *others))


if __name__ == "__main__":
    main()
