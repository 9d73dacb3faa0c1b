"""Everything that can be found wrong before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spo import scorers
from spo.command_line.config_files import check_leaves
from spo.command_line.values import fill
from spo.data.prompts import PromptSet, read_prompts
from spo.errors import UserError
from spo.launch.batch_plan import BatchPlan, plan_batches
from spo.lora_io.find import find_lora
from spo.method import build
from spo.models import backbone
from spo.models.optimizers import ADAMW
from spo.publish import push as publish
from spo.run.checkpoint_folder import read_state, reading
from spo.run.folder import run_name
from spo.run.resume import Resume, compare, facts, find_checkpoint
from spo.run.tracking import TrackerSettings


@dataclass(frozen=True)
class Preflight:
    """What a run needs to know before it loads its models."""

    plan: BatchPlan
    prompts: PromptSet
    validation_prompts: tuple[str, ...]
    run_dir: Path
    resume: Resume
    changes: tuple[str, ...]  # since the checkpoint to resume from, a line each


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
    check_leaves(config)
    build.check(config)
    fill(TrackerSettings, config.tracker)
    if config.hub.repo_id:
        publish.check_access(build.destination(config))
    plan = plan_batches(config, num_processes)
    run_dir = Path(config.logdir).expanduser() / run_name(config, config.algorithm)
    resume = find_checkpoint(config, run_dir)
    backbone.check_source(build.rollout_source(config), config.family)
    scorers.check_source(build.scorer_source(config))
    if config.lora.init_from:
        find_lora(config.lora.init_from, "lora.init_from")
    validation_prompts = read_validation_prompts(config) if config.eval_interval else ()
    prompts = read_training_prompts(config)
    changes = changes_since(resume.checkpoint, config, plan, prompts.prompts)
    return Preflight(plan, prompts, validation_prompts, run_dir, resume, tuple(changes))


def run_facts(config: ConfigDict, plan: BatchPlan, prompts: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint tells of its run, for `changes_since`."""
    digest = hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
    return facts(config, plan) | {"prompts_sha256": digest}


def changes_since(
    checkpoint: Path | None, config: ConfigDict, plan: BatchPlan, prompts: Sequence[str]
) -> list[str]:
    """What has changed since a checkpoint, a line each; UserError for what makes nonsense of it."""
    if checkpoint is None:
        return []
    state = read_state(checkpoint)
    with reading(checkpoint):
        lines = compare(state, config, plan, _refused(state, config))
        epoch = state["position"]["epochs"] + 1
        if run_facts(config, plan, prompts)["prompts_sha256"] != state["prompts_sha256"]:
            if _is_inside_epoch(state):
                raise UserError(
                    f"prompts.source: not the prompts of epoch {epoch} of {checkpoint}, which has "
                    "begun; give it the same prompts, or resume from the end of an epoch."
                )
            lines.append("resume: the prompts are not those before")
        kept = state["accumulated"] * plan.accumulation_steps // state["plan"]["accumulation_steps"]
        if state["accumulated"] and not kept:
            lines.append("resume: what was accumulated is less than a minibatch now, and dropped")
        return lines


def _is_inside_epoch(state: Mapping[str, Any]) -> bool:
    return bool(state["position"]["prompts"] or state["rollout"])


def _refused(state: Mapping[str, Any], config: ConfigDict) -> dict[str, str]:
    """Keys that may not change since `state`, and why."""
    weights = "its weights, EMA and optimizer state mean nothing to another"
    shape = ("lora.rank", "lora.alpha", "lora.target_modules")
    refused = dict.fromkeys(("algorithm", "family", "pretrained.model", *shape), weights)
    refused["lora.reference"] = "the loss compares with it"
    if config.lora.reference == "init":
        refused["lora.init_from"] = "the loss compares with it"
    if _is_inside_epoch(state):
        # Which prompts of the epoch are left, and their noise, follow from it.
        refused["seed"] = "an epoch has begun with it: resume from the end of one"
    if state["config"]["train"].get("optimizer", ADAMW) != config.train.optimizer:
        refused["train.optimizer"] = "its state means nothing to another"
    if state["rollout"]:
        # Its pairs were drawn with these, and the loss looks at them in the same way.
        drawn = "a rollout is in progress: resume from the end of one"
        refused |= dict.fromkeys(("mixed_precision", *_DRAWN_WITH), drawn)
    return refused


# Of `sample`, all but what decides how much is done at once, and which pairs are kept.
_DRAWN_WITH = (
    "sample.num_steps",
    "sample.eta",
    "sample.guidance_scale",
    "sample.num_candidates",
    "sample.branch_from",
    "sample.num_inner_steps",
    "sample.final_step",
    "sample.final_score_timestep",
    "sample.final_direction",
)
