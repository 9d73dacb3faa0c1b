"""Loads, one by one, the files that a config needs: on first use that downloads them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from ml_collections import ConfigDict

from spo.evaluation import evaluator
from spo.lora_io.find import find_lora
from spo.method.build import read_recipe
from spo.models.backbone import DTYPES
from spo.models.decoder import load_decoder
from spo.models.loading import ModelSource, check_source, load_pipeline
from spo.preference import spm_recipe
from spo.preference.rows import find_usable_rows
from spo.scorers import image_scorer, load_scorer
from spo.scorers.clip import CLIPInputs, load_clip

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
    source, run = recipe.model, recipe.run
    yield _load_base_model(source, run.family, run.mixed_precision)
    if source.decoder is not None:
        load_decoder(source.decoder, DTYPES[run.mixed_precision])
        yield f"decoder: {source.decoder}"
    load_scorer(recipe.scorer, _CPU)
    yield f"preference model: {recipe.scorer.name}"
    if recipe.lora.init_from:
        yield f"LoRA: {find_lora(recipe.lora.init_from, 'lora.init_from')}"


def _of_preference_model(config: ConfigDict) -> Iterator[str]:
    recipe = spm_recipe.read_recipe(config)
    spm, labels, data = recipe.spm, recipe.labels, recipe.data
    spm_recipe.build_spm(spm, recipe.seed, gradient_checkpointing=False)
    CLIPInputs(spm.processor)
    yield f"preference model: {spm.init_from or spm.backbone}"
    if labels.source == "pickscore":
        load_clip(labels.backbone, "labels")
        CLIPInputs(labels.processor, "labels")
        yield f"labels: {labels.backbone}"
    yield _load_base_model(recipe.base, config.family, config.mixed_precision)
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
        yield _load_base_model(source, config.family, config.mixed_precision)
    for scorer in ready.scorers:
        yield f"scorer: {load_scorer(image_scorer(scorer.name, scorer.options), _CPU).title}"


def _load_base_model(source: ModelSource, family: str, mixed_precision: str) -> str:
    check_source(source, family)
    pipe = load_pipeline(source, family, DTYPES[mixed_precision])
    size = sum(p.numel() for p in pipe.unet.parameters())
    return f"base model: {source.model}, UNet of {size / 1e6:.1f} M parameters"
