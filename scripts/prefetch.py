"""Download everything that a config needs, and check it by loading it.

    python scripts/prefetch.py --config=config/sdxl.py
    python scripts/prefetch.py --config=config/spm_sdxl.py
    python scripts/prefetch.py --config=config/eval_sdxl.py

Afterwards the run works offline (HF_HUB_OFFLINE=1).
"""

from collections.abc import Collection

from absl import app

from spo.command_line.config_files import BASE, EVAL_BASE, SPM_BASE
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags


def base_of(keys: Collection[str]) -> str:
    """Returns the base of a config: evaluations have `models`, preference models have `data`."""
    return EVAL_BASE if "models" in keys else SPM_BASE if "data" in keys else BASE


CONFIG = define_config("config/sd15.py", base=base_of)


def main(_) -> None:
    with exit_on_user_error():
        config = CONFIG.value
        commands = {EVAL_BASE: prefetch_evaluation, SPM_BASE: prefetch_preference_model}
        commands.get(base_of(config), prefetch)(config)
        print("Everything is there.")


def prefetch(config) -> None:
    """Load, one by one, the prompts, base model, decoder, scorer and the LoRA to start from."""
    import torch

    from spo import scorers
    from spo.lora_io.find import find_lora
    from spo.method import build, preflight
    from spo.models.backbone import DTYPES
    from spo.models.decoder import load_decoder

    build.check(config)
    print(preflight.read_training_prompts(config).describe())
    print(f"{len(preflight.read_validation_prompts(config))} validation prompts")
    source = build.rollout_source(config)
    load_base_model(source, config)
    if source.decoder is not None:
        load_decoder(source.decoder, DTYPES[config.mixed_precision])
        print(f"decoder: {source.decoder}")
    scorers.load_scorer(build.scorer_source(config), torch.device("cpu"))
    print(f"preference model: {config.preference.scorer}")
    if config.lora.init_from:
        print(f"LoRA: {find_lora(config.lora.init_from, 'lora.init_from')}")


def prefetch_preference_model(config) -> None:
    """Load what the training of a preference model needs: the CLIPs, the base model, the rows."""
    from spo.preference.rows import find_usable_rows
    from spo.preference.spm_recipe import build_spm, read_recipe
    from spo.scorers.clip import CLIPInputs, load_clip

    recipe = read_recipe(config)
    spm, labels, data = recipe.spm, recipe.labels, recipe.data
    build_spm(spm, recipe.seed, gradient_checkpointing=False)
    CLIPInputs(spm.processor)
    print(f"preference model: {spm.init_from or spm.backbone}")
    if labels.source == "pickscore":
        load_clip(labels.backbone, "labels")
        CLIPInputs(labels.processor, "labels")
        print(f"labels: {labels.backbone}")
    load_base_model(recipe.base, config)
    # Last, as Pick-a-Pic is by far the largest.
    print(find_usable_rows(data, data.train_split).description)
    if recipe.validates:
        print(find_usable_rows(data, data.validation_split, need_has_label=True).description)
    if data.streaming:
        print("The rows are not kept: data.streaming reads them from their source in training.")


def prefetch_evaluation(config) -> None:
    """Load what an evaluation needs: the prompts, the models with their LoRAs, the scorers."""
    import torch

    from spo.evaluation.evaluator import preflight
    from spo.scorers import ImageScorerSource, load_scorer

    ready = preflight(config, num_processes=1)
    print(ready.prompts.describe())
    for source in {spec.source for spec in ready.models if spec.source is not None}:
        load_base_model(source, config)
    for scorer in ready.scorers:
        source = ImageScorerSource(scorer.name, scorer.options)
        loaded = load_scorer(source, torch.device("cpu"))
        print(f"scorer: {loaded.title}")


def load_base_model(source, config) -> None:
    """Load a base model, and say how large it is."""
    from spo.models.backbone import DTYPES
    from spo.models.loading import check_source, load_pipeline

    check_source(source, config.family)
    pipe = load_pipeline(source, config.family, DTYPES[config.mixed_precision])
    size = sum(p.numel() for p in pipe.unet.parameters())
    print(f"base model: {source.model}, UNet of {size / 1e6:.1f} M parameters")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
