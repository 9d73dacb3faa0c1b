"""Lists all downloads of the configs in config/, or makes and checks those of one config.

    python scripts/prefetch.py                            sizes, licences, cached or not
    python scripts/prefetch.py --check                    and whether each answers
    python scripts/prefetch.py --config=config/sdxl.py    downloads what it needs, and loads it once
    python scripts/prefetch.py --config=config/spm_sdxl.py
    python scripts/prefetch.py --config=config/eval_sdxl.py

Afterwards the run works offline (HF_HUB_OFFLINE=1).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from absl import app, flags

from spo.command_line.config_files import BASE, EVAL_BASE, SPM_BASE
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags

if TYPE_CHECKING:  # torch takes seconds to load
    from ml_collections import ConfigDict

    from spo.models.loading import ModelSource


def base_of(keys: Collection[str]) -> str:
    """Returns the base of a config: evaluations have `models`, preference models have `data`."""
    return EVAL_BASE if "models" in keys else SPM_BASE if "data" in keys else BASE


def main(_) -> None:
    if not NAMES_CONFIG:
        from spo.costs.downloads import describe

        print(describe(CHECK.value))
        print(
            "To download what one config needs: python scripts/prefetch.py --config=config/NAME.py"
        )
        return
    with exit_on_user_error():
        for line in prefetch(CONFIG.value):
            print(line)
        print("Everything is there.")


def prefetch(config: ConfigDict) -> Iterator[str]:
    """Loads the files of a training, a preference model's training or an evaluation.

    Yields a line for each. Raises UserError for a file that is missing or broken.
    """
    if "models" in config:
        return of_evaluation(config)
    return of_preference_model(config) if "data" in config else of_training(config)


def of_training(config: ConfigDict) -> Iterator[str]:
    import torch

    from spo.guard.judges import Judges, find_judges
    from spo.lora_io.find import find_lora
    from spo.method.build import read_recipe
    from spo.scorers import load_scorer

    recipe = read_recipe(config)
    yield recipe.read_prompts().describe()
    yield f"{len(recipe.validation.read_prompts())} validation prompts"
    yield load_base_model(recipe.model, config)
    load_scorer(recipe.scorer, torch.device("cpu"))
    yield f"preference model: {recipe.scorer.name}"
    settings = recipe.validation
    if recipe.run.eval_interval and settings.num_judged:
        sources, lines = find_judges(settings.judges, settings.judge_options, recipe.scorer)
        judges = Judges(sources, torch.device("cpu"))
        yield from (*lines, *judges.failed.values())
        yield f"judges: {', '.join(judges.scorers) or 'none'}"
    if recipe.lora.init_from:
        yield f"LoRA: {find_lora(recipe.lora.init_from, 'lora.init_from')}"


def of_preference_model(config: ConfigDict) -> Iterator[str]:
    import torch

    from spo.models.loading import check_source
    from spo.preference import pair_recipe
    from spo.preference.rows import find_training_rows, find_usable_rows

    recipe = pair_recipe.read_pair_recipe(config)
    start, labels, data = recipe.start, recipe.labels, recipe.data
    check_source(recipe.base, recipe.family)
    base = pair_recipe.build_preparation(recipe, torch.device("cpu")).backbone
    yield f"base model: {recipe.base.model}; labels: {labels.source}"
    pair_recipe.build_scorer(recipe, base)
    own = recipe.base.model if recipe.is_latent else start.backbone
    yield f"preference model: {start.init_from or own}"
    # Last, because Pick-a-Pic is by far the largest.
    rows = find_training_rows(data)
    yield "\n".join([*rows.unavailable, rows.description])
    if recipe.validates:
        yield find_usable_rows(rows.data, data.validation_split, need_has_label=True).description
    if data.streaming:
        yield "The rows are not kept: data.streaming reads them from their source in training."


def of_evaluation(config: ConfigDict) -> Iterator[str]:
    import torch

    from spo.evaluation.evaluator import plan_evaluation
    from spo.scorers import image_scorer, load_scorer

    ready = plan_evaluation(config, num_processes=1)
    yield ready.prompts.describe()
    for source in {spec.source for spec in ready.models if spec.source is not None}:
        yield load_base_model(source, config)
    for scorer in ready.scorers:
        source = image_scorer(scorer.name, scorer.options)
        yield f"scorer: {load_scorer(source, torch.device('cpu')).title}"


def load_base_model(source: ModelSource, config: ConfigDict) -> str:
    import torch

    from spo.models.backbone import Backbone
    from spo.models.loading import check_source

    check_source(source, config.family)
    Backbone(source, config.family, config.mixed_precision, torch.device("cpu"))
    decoder = f"; decoder: {source.decoder}" if source.decoder else ""
    return f"base model: {source.model}{decoder}"


if __name__ == "__main__":
    CONFIG = define_config("config/sd15.py", base=base_of)
    CHECK = flags.DEFINE_bool("check", False, "Ask the Hub and the web for each, download nothing.")
    NAMES_CONFIG = any(argument.lstrip("-").startswith("config") for argument in sys.argv[1:])
    app.run(main, flags_parser=parse_flags)
