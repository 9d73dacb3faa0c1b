"""Compares models on the same prompts and seeds: images, scores, who wins, a report to look at.

python scripts/evaluate.py --config.models=base --config.models=gradspo=runs/NAME
python -m spo.launch scripts/evaluate.py --config=config/eval_sdxl.py ...    # on every GPU
python scripts/evaluate.py --config=config/eval_scales.py ...    # each LoRA at five strengths

config/eval_base.py explains every key. One that was killed goes on with the same --config.run_name.
"""

from absl import app

from spo.command_line.config_files import EVAL_BASE
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config(EVAL_BASE, base=EVAL_BASE)


def main(_):
    from spo.evaluation.evaluator import evaluate  # a bad command line fails before torch loads

    with exit_on_user_error():
        evaluate(CONFIG.value)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
