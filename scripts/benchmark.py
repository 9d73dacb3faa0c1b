"""Measures one iteration on this machine, or counts it without weights at full size.

    python scripts/benchmark.py --config=config/tiny.py --json=benchmark.json
    python scripts/benchmark.py --config=config/sd15.py --random --compare sample.decode_batch_size=16
    python scripts/benchmark.py --config=config/sdxl.py --meta --tflops=100 --num_gpus=4

The first times a rollout and the training on its pairs, through the functions that training calls. The
second times two configs in turn, with random weights instead of published ones. The third runs the
same code on shapes only: FLOPs, memory, what fits on a card, hours of a whole run.
docs/performance.md explains the figures.
"""

from functools import partial
from pathlib import Path

from absl import app, flags

from spo.atomic import check_output, write_json
from spo.command_line.flags import changed, define_config, exit_on_user_error, parse_flags
from spo.errors import UserError

CONFIG = define_config("config/sd15.py")
REPEATS = flags.DEFINE_integer("repeats", 5, "measured iterations, after one that warms up")
COMPARE = flags.DEFINE_multi_string(
    "compare",
    [],
    "[FILE.py][,key=value...]: a variant of the config, or of another file; may be given several times",
)
ROUNDS = flags.DEFINE_integer("rounds", 3, "--compare: turns of each variant")
RANDOM = flags.DEFINE_boolean("random", False, "random weights: nothing is downloaded")
JSON = flags.DEFINE_string("json", "", "file for the figures")
META = flags.DEFINE_boolean("meta", False, "count on shapes only, without weights")
TFLOPS = flags.DEFINE_float("tflops", 100.0, "--meta: TFLOP/s that a GPU reaches")
NUM_GPUS = flags.DEFINE_integer("num_gpus", 4, "--meta: GPUs of the run")


def main(_) -> None:
    with exit_on_user_error():
        check_flags()
        configs = {"baseline": CONFIG.value}
        configs |= {change: changed(CONFIG.value, change) for change in COMPARE.value}

        from spo.costs import benchmark  # torch takes seconds to load
        from spo.costs.load import META as META_DEVICE
        from spo.costs.load import load_models
        from spo.method.build import read_recipe
        from spo.models.gpu import pick_device

        recipes = {name: read_recipe(config) for name, config in configs.items()}

        if META.value:
            recipe = recipes["baseline"]
            num = CONFIG.value.prompts.num or 1000  # 0 takes all there are
            prompts = recipe.run.num_epochs * num
            models = load_models(recipe, META_DEVICE)
            figures = benchmark.print_costs(models, prompts, TFLOPS.value, NUM_GPUS.value)
        else:
            device, rounds = pick_device(), ROUNDS.value if COMPARE.value else 1
            loaders = {n: partial(load_models, r, device, RANDOM.value) for n, r in recipes.items()}
            figures = benchmark.print_times(loaders, rounds, REPEATS.value)
            figures = {"variants": figures} if COMPARE.value else figures["baseline"]
        if JSON.value:
            write_json(Path(JSON.value), figures)


def check_flags() -> None:
    """Raises UserError for a flag that makes no sense."""
    for flag in (REPEATS, ROUNDS, NUM_GPUS, TFLOPS):
        if not flag.value > 0:
            raise UserError(f"--{flag.name}: {flag.value} must be above 0.")
    folder = Path(JSON.value).absolute().parent
    if JSON.value and not folder.is_dir():
        raise UserError(f"--json: there is no folder {folder}; make it first.")
    if JSON.value:
        check_output(Path(JSON.value), "--json")
    if META.value and COMPARE.value:
        raise UserError("--meta, --compare: give one of them.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
