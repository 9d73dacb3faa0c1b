"""Every check of config and files that is possible before a model loads."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from spo.data.prompts import PromptSet
from spo.errors import UserError
from spo.guard.judges import find_judges
from spo.launch.batch_plan import BatchPlan, plan_batches
from spo.lora_io.find import find_lora
from spo.method.build import Recipe, read_recipe
from spo.method.checkpoint import check_state
from spo.models.loading import check_source
from spo.plugins import algorithm_name
from spo.run.checkpoint_folder import read_state, reading
from spo.run.folder import run_folder
from spo.run.resume import Resume, changes, checkpoint_facts, find_checkpoint
from spo.scorers import ScorerSource, check_scorer


@dataclass(frozen=True)
class Preflight:
    """Everything that a run knows before its models load."""

    recipe: Recipe
    plan: BatchPlan
    prompts: PromptSet
    validation_prompts: tuple[str, ...]  # none: no validation images
    judges: tuple[ScorerSource, ...]  # of these images
    run_dir: Path
    resume: Resume
    notes: tuple[str, ...]  # to be said: of the judges, and changes since the checkpoint

    def facts(self) -> dict[str, Any]:
        """Returns the entries of a checkpoint that a resumed run compares itself with."""
        own = {"prompts_sha256": self.prompts.digest()}
        return checkpoint_facts(self.recipe.config, self.plan) | own


def preflight(config: ConfigDict, num_processes: int) -> Preflight:
    """Checks config and files, and reads the prompts; writes nothing. Raises UserError in one line."""
    recipe = read_recipe(config)
    run = recipe.run
    validation = recipe.validation
    is_judged = run.eval_interval and validation.has_judges
    if recipe.hub.repo_id:
        from spo.publish.push import check_access

        if recipe.hub.checkpoint == "best" and not is_judged:
            raise UserError(
                "hub.checkpoint: no checkpoint is the best where nobody judges; set eval_interval, "
                "eval.num_judged and eval.judges, or leave it empty."
            )
        check_access(recipe.hub)
    plan = plan_batches(config, num_processes)
    run_dir = run_folder(run.logdir, run.run_name, algorithm_name(run.algorithm), run.family)
    resume = find_checkpoint(run_dir, run.run_name, run.resume_from)
    check_scorer(recipe.scorer, run.family, check_source(recipe.model, run.family))
    if recipe.lora.init_from:
        find_lora(recipe.lora.init_from, "lora.init_from")
    images, judges, notes = (), (), ()
    if run.eval_interval:
        images = validation.read_prompts()
    if is_judged:
        judges, notes = find_judges(validation.judges, validation.judge_options, recipe.scorer)
    prompts = recipe.read_prompts()
    ready = Preflight(recipe, plan, prompts, images, judges, run_dir, resume, notes)
    if resume.checkpoint is None:
        return ready
    return replace(ready, notes=(*notes, *changes_since(resume.checkpoint, ready)))


def changes_since(checkpoint: Path, ready: Preflight) -> list[str]:
    """Returns a line for each change since a checkpoint; UserError if one makes it unusable."""
    state, plan = read_state(checkpoint), ready.plan
    with reading(checkpoint):
        lines = changes(state, ready.recipe.config, plan, refusal(state, ready.recipe))
        if ready.facts()["prompts_sha256"] != state["prompts_sha256"]:
            if _is_inside_epoch(state):
                raise UserError(
                    f"prompts.source: not the prompts of epoch {state['position']['epochs'] + 1} of "
                    f"{checkpoint}, which has begun; give it the same prompts, or resume from the end "
                    "of an epoch."
                )
            lines.append("resume: the prompts are not those before")
        check_state(checkpoint, state, len(ready.prompts.prompts))
        kept = state["accumulated"] * plan.accumulation_steps // state["plan"]["accumulation_steps"]
        if state["accumulated"] and not kept:
            lines.append("resume: what was accumulated is less than a minibatch now, and dropped")
        return lines


def _is_inside_epoch(state: Mapping[str, Any]) -> bool:
    return bool(state["position"]["prompts"] or state["rollout"])


# A rollout in progress was drawn with every other key of `sample`.
_FREE_WITHIN_ROLLOUT = (
    "sample.batch_size",
    "sample.global_batch_size",
    "sample.decode_batch_size",
    "sample.decoder",
    "sample.score_batch_size",
    "sample.threshold",
    "sample.threshold_schedule",
    "sample.threshold_min",
    "sample.threshold_max",
    "sample.keep_all_final",
)


def refusal(state: Mapping[str, Any], recipe: Recipe) -> Callable[[str], str | None]:
    """Returns a function that tells why a config key may not change since `state`, or None."""

    def reason(key: str) -> str | None:
        section = key.partition(".")[0]
        if key == "lora.reference" or (key == "lora.init_from" and recipe.lora.reference == "init"):
            return "the loss compares with it"
        if key in ("algorithm", "family", "pretrained.model") or (
            section == "lora" and key not in ("lora.init_from", "lora.merge")
        ):
            return "its weights, EMA and optimizer state mean nothing to another"
        if key == "train.optimizer":
            return "its state means nothing to another"
        # The prompts of the epoch that are left, and their noise, follow from it.
        if key == "seed" and _is_inside_epoch(state):
            return "an epoch has begun with it: resume from the end of one"
        drawn_with = section == "sample" and key not in _FREE_WITHIN_ROLLOUT
        if state["rollout"] and (drawn_with or key == "mixed_precision"):
            return "a rollout is in progress: resume from the end of one"
        return None

    return reason
