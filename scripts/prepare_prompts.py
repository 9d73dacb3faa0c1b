"""Draws unique prompts with a seed, and writes them to a file that `prompts.source` can name.

python scripts/prepare_prompts.py --source=pickapic-sfw --num=4000 --output=prompts.json
python scripts/prepare_prompts.py --source=captions.csv --column=text --num=500 --output=eval.txt
"""

import argparse
import json
from pathlib import Path

from spo.atomic import check_output, write_file
from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import path
from spo.data.prompts import read_prompts
from spo.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--source",
        default="official-4k",
        help="name, file, folder, https address or Hub id, as config.prompts.source (%(default)s)",
    )
    parser.add_argument("--split", default="train", help="split of a dataset (%(default)s)")
    parser.add_argument("--column", default="caption", help="holds the prompt (%(default)s)")
    parser.add_argument("--num", type=int, default=0, help="0 takes all, in order (%(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draw (%(default)s)")
    parser.add_argument("--output", type=path, required=True, help="a .json or .txt file")
    return parser.parse_args()


def write_prompts(prompts: tuple[str, ...], output: Path) -> None:
    """Writes a .json list of {"caption": ...}, or a .txt file with one prompt per line.

    Raises UserError if a prompt for a .txt file holds a line break.
    """
    if output.suffix == ".json":
        text = json.dumps([{"caption": p} for p in prompts], ensure_ascii=False, indent=1)
    else:
        broken = [p for p in prompts if "\n" in p]
        if broken:
            raise UserError(
                f"--output: {len(broken)} prompts hold line breaks, which a .txt file cannot "
                f"keep, the first {broken[0][:60]!r}; write a .json file"
            )
        text = "\n".join(prompts)
    write_file(output, f"{text}\n".encode())


def main() -> None:
    args = parse_args()
    if args.output.suffix not in (".json", ".txt"):
        raise UserError(f"--output: {args.output} must end in .json or .txt")
    check_output(args.output, "--output")
    found = read_prompts(
        args.source, split=args.split, column=args.column, num=args.num, seed=args.seed
    )
    write_prompts(found.prompts, args.output)
    print(found.describe())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
