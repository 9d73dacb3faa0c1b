"""Everything that can be found wrong before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from spo import backbone, publish, scorers, settings, tracking
from spo.batching import BatchPlan, plan_batches
from spo.lora_files import find_lora
from spo.prompts import PromptSet, read_prompts
from spo.run_dir import find_checkpoint, run_name


@dataclass(frozen=True)
class Preflight:
    """What a run needs to know before it loads its models."""

    plan: BatchPlan
    prompts: PromptSet
    validation_prompts: tuple[str, ...]
    run_dir: Path
    checkpoint: Path | None  # to resume from


def read_training_prompts(config: ConfigDict) -> PromptSet:
    prompts = config.prompts
    return read_prompts(
        prompts.source,
        split=prompts.split,
        column=prompts.column,
        num=prompts.num,
        seed=prompts.seed,
    )


def read_validation_prompts(config: ConfigDict) -> tuple[str, ...]:
    prompts = read_prompts(config.eval.prompts, key="eval.prompts").prompts
    return prompts[: config.eval.num_images]


def preflight(config: ConfigDict, num_processes: int) -> Preflight:
    """Check config and files and read the prompts; nothing is written. UserError in one line."""
    settings.check(config)
    tracking.check_tracker(config.tracker.name)
    if config.hub.repo_id:
        publish.check_access(settings.destination(config))
    plan = plan_batches(config, num_processes)
    run_dir = Path(config.logdir).expanduser() / run_name(config, config.algorithm)
    checkpoint = find_checkpoint(config, run_dir)
    backbone.check_source(settings.model_source(config), config.family)
    scorers.check_source(settings.scorer_source(config))
    if config.lora.init_from:
        find_lora(config.lora.init_from, "lora.init_from")
    validation_prompts = read_validation_prompts(config) if config.eval_interval else ()
    prompts = read_training_prompts(config)
    return Preflight(plan, prompts, validation_prompts, run_dir, checkpoint)
