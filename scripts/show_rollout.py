"""Draws what the method sees: the K candidates of every step of one prompt's rollout.

    python scripts/show_rollout.py --config=config/tiny.py \\
        --prompt="a small red circle on a blue background"

One row per comparison: the decoded candidates with their scores, the best framed green, the worst red,
and the one from which the rollout went on. `--lora` draws with a trained LoRA (run, file or Hub id).
"""

from pathlib import Path

from absl import app, flags

from spo.atomic import check_output
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags
from spo.errors import UserError

CONFIG = define_config("config/sd15.py")
PROMPT = flags.DEFINE_string("prompt", None, "what to roll out", required=True)
LORA = flags.DEFINE_string("lora", "", "LoRA that draws the candidates; none: the base model")
SEED = flags.DEFINE_integer("seed", 0, "seed of the rollout")
OUT = flags.DEFINE_string("out", "runs/rollout.png", "picture to write")


def main(_) -> None:
    with exit_on_user_error():
        out = Path(OUT.value)
        if out.suffix != ".png":
            raise UserError(f"--out: {out} must end in .png")
        check_output(out, "--out")

        from spo.evaluation.rollout_picture import draw_rollout  # torch takes seconds to load
        from spo.method.build import read_recipe
        from spo.run.pictures import write_png

        recipe = read_recipe(CONFIG.value)
        write_png(out, draw_rollout(recipe, PROMPT.value, LORA.value, SEED.value))
        print(f"picture: {out}")
        print("a row for each comparison; framed green: the highest score, red: the lowest")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
