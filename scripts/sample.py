"""Draws prompts with any number of models, and a labelled grid with the models side by side.

    python scripts/sample.py --models base runs/NAME --prompts "a fox reading a map" --seeds 0 1
    python scripts/sample.py --models base JTTJ/GradSPO/sd1_5 --prompts_file prompts.txt
    python scripts/sample.py --models runs/NAME --lora_scale 0,0.5,1 --prompts "a fox reading a map"

A model is [NAME=]base, [NAME=]LORA[:WEIGHT] (a run, a checkpoint, a file or a Hub id; several joined by
+), a diffusers folder or a Hub id. The PNG text of every image states how it was made.
"""

import argparse
import time
from pathlib import Path

from spo.command_line.flags import exit_on_user_error
from spo.command_line.values import expand, path


def numbers(text: str) -> list[float]:
    """Reads numbers with commas between them."""
    return [float(part) for part in text.split(",")]


def pixels(text: str) -> tuple[int, int]:
    """Reads WIDTHxHEIGHT; raises an error unless both are multiples of 8."""
    width, height = map(int, text.split("x"))
    if min(width, height) < 8 or width % 8 or height % 8:
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT in multiples of 8")
    return width, height


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["base"], help="columns of the grid")
    parser.add_argument(
        "--base", type=expand, help="base model (default: that of the run of the LoRA, or SD1.5)"
    )
    parser.add_argument(
        "--vae", type=expand, help="Hub id or folder that replaces the base model's own VAE"
    )
    parser.add_argument("--prompts", nargs="+", default=[], help="rows of the grid")
    parser.add_argument("--prompts_file", help="json, jsonl, txt, csv or parquet")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each draws every prompt")
    parser.add_argument(
        "--lora_scale", type=numbers, help="0,0.5,1: every LoRA at each of these strengths"
    )
    parser.add_argument("--scheduler", default="ddim", help="ddim, dpm++, euler, euler_a or unipc")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument(
        "--size", type=pixels, help="e.g. 768x512, multiples of 8 (default: the base model's own)"
    )
    parser.add_argument("--mixed_precision", help="no, fp16 or bf16 (default: fp16 on a GPU)")
    parser.add_argument("--batch_size", type=int, default=1, help="images drawn at once")
    parser.add_argument("--out", type=path, help="folder (default: runs/samples_TIME)")
    options = parser.parse_args()
    with exit_on_user_error():
        sample(options)


def sample(options: argparse.Namespace) -> None:
    """Checks everything, draws, and prints where the grid is."""
    from spo.evaluation import images_cli

    settings = images_cli.SampleSettings(
        seeds=tuple(options.seeds),
        scheduler=options.scheduler,
        num_steps=options.steps,
        guidance_scale=options.guidance,
        size=options.size,
        mixed_precision=options.mixed_precision,
        batch_size=options.batch_size,
    )
    base = options.base or images_cli.default_base(options.models)
    models = images_cli.read_models(options.models, base, options.vae, options.lora_scale)
    prompts = images_cli.sample_prompts(options.prompts, options.prompts_file)
    out = options.out or Path("runs") / f"samples_{time.strftime('%Y%m%d_%H%M%S')}"
    print(f"grid: {images_cli.draw_samples(models, prompts, settings, out)}")


if __name__ == "__main__":
    main()
