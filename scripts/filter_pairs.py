"""Scores the pairs of a labelled data set by several judges, for `data.filter` of a training.

    python scripts/filter_pairs.py --config=config/spm_sd15.py --output=scores.parquet \\
        --vqa=llava-hf/llava-1.5-7b-hf

The judges are the scorers `aesthetic` and `clipscore`, and, with --vqa, a model that is asked whether
an image shows its prompt. The same command again goes on where it was killed.
"""

import json
from pathlib import Path

from absl import app, flags

from spo.atomic import check_output
from spo.command_line.config_files import SPM_BASE
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags
from spo.command_line.values import path
from spo.errors import UserError

CONFIG = define_config("config/spm_sd15.py", base=SPM_BASE)
OUTPUT = flags.DEFINE_string("output", "", "the .parquet file to write")
SPLIT = flags.DEFINE_string("split", "", "split to score; empty: data.train_split")
VQA = flags.DEFINE_string("vqa", "", "chat model for images and text: a Hub id or folder; or none")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "pairs scored at once")
OPTIONS = flags.DEFINE_string(
    "scorer_options", "{}", 'options as JSON, as in evaluations: {"aesthetic": {"head": "FILE"}}'
)


def main(_) -> None:
    with exit_on_user_error():
        options, output = check_flags()

        from spo.models.gpu import pick_device  # torch takes seconds to load
        from spo.preference.pair_recipe import read_pair_recipe
        from spo.preference.pair_scores import Scoring, score_split

        data = read_pair_recipe(CONFIG.value).data
        if not VQA.value:
            print("no --vqa: vqascore_gap stays empty, and the filter does not ask for it")
        scoring = Scoring(options, VQA.value, BATCH_SIZE.value)
        split, device = SPLIT.value or data.train_split, pick_device()
        print(score_split(data, split, scoring, output, device))


def check_flags() -> tuple[dict, Path]:
    """Returns the scorers' options and the output; raises UserError for a flag that makes no sense."""
    try:
        options = json.loads(OPTIONS.value)
    except ValueError as error:
        raise UserError(f"--scorer_options: {OPTIONS.value!r} is not JSON ({error}).") from error
    judges = {"aesthetic", "clipscore"}
    if not isinstance(options, dict) or not options.keys() <= judges:
        raise UserError(f"--scorer_options: an object of options of {', '.join(sorted(judges))}.")
    if BATCH_SIZE.value < 1:
        raise UserError(f"--batch_size: {BATCH_SIZE.value} must be 1 or more.")
    output = path(OUTPUT.value)
    if output.suffix != ".parquet":
        raise UserError(f"--output: {OUTPUT.value!r} must end in .parquet.")
    if output.is_file():
        raise UserError(f"--output: {output} is there; name another file, or delete it.")
    check_output(output, "--output")
    return options, output


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
