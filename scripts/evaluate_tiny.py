"""Compares a run on the tiny world with its base model, in five lines, a picture and curves.

    python scripts/evaluate_tiny.py runs/NAME [--weights ema] [--num_images 200]

Draws the held-out captions with the base model and with the run's LoRA, from the same noise. Compares
the images by the hidden quality, and by the share whose size, colour, shape and background are those of
the caption: both are read from the pixels, and training knows neither. Writes tiny_world.png,
curves.png and tiny_world.json into the run directory.
"""

import argparse
from dataclasses import asdict

from spo.command_line.flags import changed, exit_on_user_error, overridden
from spo.command_line.values import path

PROMPTS = "assets/tiny/prompts/held_out.txt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=path)
    parser.add_argument("--weights", choices=("policy", "ema"), default="policy")
    parser.add_argument("--num_images", type=int, default=200)
    # Code of the run, such as its loss, which its config.json alone does not run: --config.KEY=VALUE.
    options, changes = parser.parse_known_args()
    with exit_on_user_error():
        evaluate(options, changes)


def evaluate(options: argparse.Namespace, changes: list[str]) -> None:
    """Draws and judges the images, writes the files and prints the result."""
    from spo.atomic import check_output, write_json
    from spo.command_line.config_files import load_config
    from spo.data.prompts import read_prompts
    from spo.evaluation.run_report import draw_curves
    from spo.method.build import read_recipe
    from spo.run.folder import CONFIG
    from spo.run.pictures import write_png
    from spo.tiny_world.evaluation import Bench, before_and_after, compare

    run_dir = options.run_dir
    config = load_config(str(run_dir / CONFIG), said=overridden(changes))
    if changes:
        config = changed(config, ",".join(text.removeprefix("--config.") for text in changes))
    recipe = read_recipe(config)
    check_output(run_dir / "tiny_world.json", "RUN_DIR")
    algorithm = recipe.run.algorithm
    name = "GradSPO" if algorithm == "gradspo" else algorithm.upper()
    prompts = read_prompts(PROMPTS).prompts[: options.num_images]
    bench = Bench(recipe, prompts)
    trained = bench.score(run_dir / "ema" if options.weights == "ema" else run_dir)
    verdict = compare(bench.base, trained)
    picture = run_dir / "tiny_world.png"
    write_png(picture, before_and_after(bench.base, trained, prompts, name))
    write_json(run_dir / "tiny_world.json", asdict(verdict))
    print(verdict.describe(name))
    print(f"pictures      {picture}, {draw_curves(run_dir)}")


if __name__ == "__main__":
    main()
