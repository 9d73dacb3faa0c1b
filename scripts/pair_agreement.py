"""Measures how much a run's pairs change with the scorer: a tiny decoder, another precision.

    python scripts/pair_agreement.py --config=config/tiny.py \\
        --compare=sample.decoder=assets/tiny/decoder

Rolls out the first prompts of the run exactly as training would, once, as the candidates do not depend
on their scores. Each `--compare=KEY=VALUE` (decoder, threshold, preference model) judges them beside
the config itself, and so does the judge of another config, `--compare=FILE.py`, if all else is alike:

    python scripts/pair_agreement.py --config=config/sd15.py --config.sample.branch_from=0 \\
        --compare=config/gradspo_lrm_sd15.py

`--config.lora.init_from=RUN` draws them with what a run has learned.
"""

from pathlib import Path

from absl import app, flags

from spo.atomic import check_output, write_json
from spo.command_line.flags import changed, define_config, exit_on_user_error, parse_flags
from spo.errors import UserError

CONFIG = define_config("config/sd15.py")
COMPARE = flags.DEFINE_multi_string(
    "compare", [], "KEY=VALUE or FILE.py that judges beside the config"
)
ROLLOUTS = flags.DEFINE_integer("rollouts", 4, "number of the run's rollouts")
JSON = flags.DEFINE_string("json", "", "file for the figures")


def main(_) -> None:
    with exit_on_user_error():
        check_flags()
        configs = {"config": CONFIG.value}
        configs |= {change: changed(CONFIG.value, change) for change in COMPARE.value}

        from spo.costs.pair_agreement import compare_judges  # torch takes seconds to load
        from spo.method.build import read_recipe

        recipes = {name: read_recipe(config) for name, config in configs.items()}
        figures = compare_judges(recipes, ROLLOUTS.value)
        if JSON.value:
            write_json(Path(JSON.value), figures)


def check_flags() -> None:
    """Raises UserError for a flag that makes no sense."""
    if not COMPARE.value:
        raise UserError(
            "--compare: name a change, e.g. --compare=sample.decoder=madebyollin/taesd."
        )
    if ROLLOUTS.value < 1:
        raise UserError(f"--rollouts: {ROLLOUTS.value} must be 1 or more.")
    if JSON.value and not Path(JSON.value).absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {Path(JSON.value).parent}; make it first.")
    if JSON.value:
        check_output(Path(JSON.value), "--json")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
