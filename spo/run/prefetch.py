"""Loads, one by one, the files that a config needs: on first use that downloads them."""

from collections.abc import Iterator

import torch
from ml_collections import ConfigDict

from spo.evaluation import evaluator
from spo.lora_io.find import find_lora
from spo.method.build import read_recipe
from spo.models.backbone import Backbone
from spo.models.loading import ModelSource, check_source
from spo.preference import spm_recipe
from spo.preference.rows import find_usable_rows
from spo.scorers import ImageScorerSource, load_scorer

_CPU = torch.device("cpu")


def prefetch(config: ConfigDict) -> Iterator[str]:
    """Loads the files of a training, a preference model's training or an evaluation.

    Yields a line for each. Raises UserError for a file that is missing or broken.
    """
    if "models" in config:
        return _of_evaluation(config)
    return _of_preference_model(config) if "data" in config else _of_training(config)


def _of_training(config: ConfigDict) -> Iterator[str]:
    recipe = read_recipe(config)
    yield recipe.prompts.read().describe()
    yield f"{len(recipe.validation.read_prompts())} validation prompts"
    yield _load_base_model(recipe.model, config)
    load_scorer(recipe.scorer, _CPU)
    yield f"preference model: {recipe.scorer.scorer}"
    if recipe.lora.init_from:
        yield f"LoRA: {find_lora(recipe.lora.init_from, 'lora.init_from')}"


def _of_preference_model(config: ConfigDict) -> Iterator[str]:
    recipe = spm_recipe.read_recipe(config)
    spm, labels, data = recipe.spm, recipe.labels, recipe.data
    spm_recipe.build_spm(spm, recipe.seed, gradient_checkpointing=False)
    yield f"preference model: {spm.init_from or spm.backbone}"
    check_source(recipe.base, recipe.family)
    spm_recipe.build_preparation(recipe, _CPU)
    yield f"base model: {recipe.base.model}; labels: {labels.source}"
    # Last, because Pick-a-Pic is by far the largest.
    yield find_usable_rows(data, data.train_split).description
    if recipe.validates:
        yield find_usable_rows(data, data.validation_split, need_has_label=True).description
    if data.streaming:
        yield "The rows are not kept: data.streaming reads them from their source in training."


def _of_evaluation(config: ConfigDict) -> Iterator[str]:
    ready = evaluator.preflight(config, num_processes=1)
    yield ready.prompts.describe()
    for source in {spec.source for spec in ready.models if spec.source is not None}:
        yield _load_base_model(source, config)
    for scorer in ready.scorers:
        yield f"scorer: {load_scorer(ImageScorerSource(scorer.name, scorer.options), _CPU).title}"


def _load_base_model(source: ModelSource, config: ConfigDict) -> str:
    check_source(source, config.family)
    Backbone(source, config.family, config.mixed_precision, _CPU)
    decoder = f"; decoder: {source.decoder}" if source.decoder else ""
    return f"base model: {source.model}{decoder}"
