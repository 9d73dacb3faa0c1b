"""From the config to frozen values, once; and every check that is possible before a model loads."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ml_collections import ConfigDict
from torch import nn

from spo.command_line.config_files import check_leaves, leaves
from spo.command_line.values import (
    Checked,
    choice,
    fill,
    not_negative,
    require_choice,
    require_number,
    whole,
)
from spo.data.prompts import PromptSet, read_prompts
from spo.errors import UserError
from spo.hub import Destination, public_name
from spo.method.collect import CollectSettings
from spo.method.ddim import DDIM, SamplerSettings
from spo.method.learner import Learner, UpdateSettings
from spo.method.losses import Loss, make_loss
from spo.method.pairs import PairSettings
from spo.method.rollout import RolloutSettings
from spo.models.backbone import DTYPES, Backbone
from spo.models.device import SpeedSettings
from spo.models.loading import ModelSource, model_source
from spo.models.lora import Lora, LoraSettings
from spo.models.optimizers import OptimizerSettings
from spo.run.tracking import TrackerSettings
from spo.run.validation import ValidationSettings
from spo.scorers import ScorerSource, candidate_scorer, looks_at
from spo.seeding import derive_seed


@dataclass(frozen=True)
class RunSettings(Checked):
    """The course of a run; `config` explains each."""

    algorithm: str
    family: str
    seed: int
    num_epochs: int = whole()
    mixed_precision: str = choice(*DTYPES)
    logdir: str
    run_name: str
    resume_from: str
    save_interval: int = whole()
    save_every_rollouts: int = not_negative()
    checkpoint_limit: int = not_negative()
    eval_interval: int = not_negative()
    allow_tf32: bool
    deterministic: bool
    gradient_checkpointing: bool  # train.gradient_checkpointing


@dataclass(frozen=True)
class Recipe:
    """A config as checked values."""

    config: Mapping[str, Any]  # as JSON, for records
    run: RunSettings
    read_prompts: Callable[[], PromptSet]
    model: ModelSource
    scorer: ScorerSource
    speed: SpeedSettings
    lora: LoraSettings
    sampler: SamplerSettings
    collect: CollectSettings
    loss: Loss
    update: UpdateSettings
    optimizer: OptimizerSettings
    validation: ValidationSettings
    tracker: TrackerSettings
    hub: Destination
    push_every: int  # hub.push_every

    def load_backbone(self, device: Any) -> Backbone:
        """Loads the base model onto a torch.device."""
        return Backbone(self.model, self.run.family, self.run.mixed_precision, device)

    def drawing_images(self) -> "Recipe":
        """Returns a recipe whose candidates can be decoded, whatever the scorer looks at.

        With a seed they are the same: only the step in which they are compared differs.
        """
        rollout = replace(self.collect.rollout, looks_at="images")
        collect = replace(self.collect, rollout=rollout)
        return replace(self, model=replace(self.model, decodes=True), collect=collect)

    def load_sampler(self, backbone: Backbone) -> DDIM:
        """Returns the sampler of the rollout on this base model."""
        settings = self.sampler
        return backbone.sampler(settings.num_steps, settings.eta, settings.timesteps)

    def lora_metadata(self) -> dict[str, str]:
        """Returns metadata for a LoRA file, identical for identical training on any machine."""
        sections = ("pretrained", "lora", "prompts", "preference", "sample", "train")
        trained = {name: dict(self.config[name]) for name in sections}
        trained |= {name: self.config[name] for name in ("seed", "num_epochs", "mixed_precision")}
        # Keys younger than the hash stay out of it at their defaults, so that it keeps its meaning.
        for section, name, default in _YOUNGER:
            if trained[section].get(name) == default:
                del trained[section][name]
        text = json.dumps(trained, sort_keys=True)
        return {
            "base_model": public_name(self.config["pretrained"]["model"]),
            "algorithm": self.run.algorithm,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


# Keys of `sample` that mean nothing to scorers of latents or of images, and their values then.
_OFF_FOR = {
    "latents": {
        "num_inner_steps": 0,
        "final_step": "branch",
        "final_score_timestep": "zero",
        "final_direction": "window",
        "keep_all_final": False,
        "decoder": None,
    },
    "images": {"stop_at": 0, "score_timestep": "t"},
}
_YOUNGER = (
    ("sample", "stop_at", 0),
    ("sample", "score_timestep", "t"),
    ("sample", "score_batch_size", 16),
    ("sample", "threshold_schedule", None),
    ("sample", "threshold_min", None),
    ("sample", "threshold_max", None),
    ("sample", "timesteps", "model"),
    ("sample", "pairing", "best_worst"),
    ("train", "loss_kwargs", {}),
)


def read_recipe(config: ConfigDict) -> Recipe:
    """Returns a training config as values; UserError for everything wrong that needs no file."""
    check_leaves(leaves(config))
    sample, train = config.sample, config.train
    loss = make_loss(config.algorithm, train, train.loss_kwargs)
    if loss.shares_latents and sample.num_inner_steps > 0:
        raise UserError(
            f"sample.num_inner_steps: {config.algorithm} compares candidates of one shared x_t and "
            "cannot use inner steps; set it to 0, or algorithm=spo."
        )
    scorer = candidate_scorer(**config.preference.to_dict())
    judges = _what_it_judges(scorer, config)
    require_number("prompts.num", config.prompts.num, "0 or more", lambda v: v >= 0)
    require_choice("hub.weights", config.hub.weights, ("policy", "ema"))
    require_number("hub.push_every", config.hub.push_every, "0 or more", lambda v: v >= 0)
    for section in ("eval", "hub"):
        if config[section].weights == "ema" and not loss.uses_ema:
            raise UserError(f"{section}.weights: {config.algorithm} has no EMA; use policy.")
    keep = loss.uses_ema and train.ema_prediction == "rollout"
    pairs = fill(PairSettings, sample, shares_latents=loss.shares_latents, keep_predictions=keep)
    decodes = judges == "images" or config.eval_interval > 0
    update = {"accumulation_steps": 1, "guidance_scale": sample.guidance_scale}
    return Recipe(
        config=json.loads(config.to_json()),
        run=fill(RunSettings, config, gradient_checkpointing=train.gradient_checkpointing),
        read_prompts=partial(read_prompts, **config.prompts.to_dict()),
        model=model_source(config.pretrained, decoder=sample.decoder, decodes=decodes),
        scorer=scorer,
        speed=_speed(config),
        lora=fill(LoraSettings, config.lora),
        sampler=fill(SamplerSettings, sample),
        collect=fill(
            CollectSettings,
            sample,
            rollout=fill(RolloutSettings, sample, looks_at=judges),
            pairs=pairs,
        ),
        loss=loss,
        update=fill(UpdateSettings, train, merge=config.lora.merge, **update),
        optimizer=fill(OptimizerSettings, train),
        validation=fill(ValidationSettings, config.eval.to_dict()),
        tracker=fill(TrackerSettings, config.tracker),
        hub=fill(Destination, config.hub),
        push_every=config.hub.push_every,
    )


def _speed(config: Mapping[str, Any]) -> SpeedSettings:
    parts = {f"compile_{name}": value for name, value in config["compile"].items()}
    # Recomputation saves the random state, which cannot be looked at while passes are recorded.
    graphs = config["cuda_graphs"] and not config["train"]["gradient_checkpointing"]
    return SpeedSettings(config["channels_last"], **parts, cuda_graphs=graphs)


def _what_it_judges(scorer: ScorerSource, config: Mapping[str, Any]) -> str:
    """Returns "images" or "latents"; UserError for a key of a config that means nothing to those."""
    judges, sample = looks_at(scorer), config["sample"]
    if judges == "latents" and config["compile"]["vae"] and not config["eval_interval"]:
        raise UserError("compile.vae: nothing is decoded in this run; set it to False.")
    for name, off in _OFF_FOR.get(judges, {}).items():
        if sample[name] != off:
            raise UserError(
                f"sample.{name}: {sample[name]!r} means nothing to {scorer.name}, which looks at "
                f"{judges}; set it to {off!r}."
            )
    return judges


def build_lora(recipe: Recipe, unet: nn.Module) -> Lora:
    """Adds the LoRA that a run starts from to `unet`."""
    settings = recipe.lora
    if recipe.run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    lora = settings.add_to(unet, seed=derive_seed(recipe.run.seed, "lora"))
    if settings.init_from:
        from spo.lora_io.find import find_lora, read_lora

        path = find_lora(settings.init_from, "lora.init_from")
        lora.assign(read_lora(path, lora, "lora.init_from"))
    return lora


def build_learner(
    recipe: Recipe, backbone: Backbone, unet: nn.Module, lora: Lora, accumulation_steps: int
) -> Learner:
    """Returns the learner of a run; `unet` is the backbone's, or a wrapper of it, as Learner says."""
    sampler = recipe.load_sampler(backbone)
    if not recipe.loss.shares_latents and sampler.timesteps[-1] == 0:
        raise UserError(
            f"pretrained.model: the scheduler of {recipe.model.model} ends at t = 0, where "
            f"{recipe.run.algorithm} has no likelihood (sigma is 0); set sample.timesteps=trailing, or "
            "in scheduler_config.json timestep_spacing to trailing, or to leading with steps_offset 1."
        )
    first = sampler.timesteps[recipe.collect.rollout.branch_from]
    abar = sampler.alphas_cumprod[first]
    if not recipe.loss.shares_latents and not abar.is_meta and abar == 0:
        raise UserError(
            f"sample.branch_from: at t = {first}, where x_t is noise alone (terminal SNR 0), "
            f"{recipe.run.algorithm} has no likelihood; branch from 1 or later."
        )
    return Learner(
        backbone=backbone,
        unet=unet,
        lora=lora,
        optimizer=recipe.optimizer.make(lora.parameters.values()),
        loss=recipe.loss,
        sampler=sampler,
        settings=replace(recipe.update, accumulation_steps=accumulation_steps),
        reference=lora.snapshot() if recipe.lora.reference == "init" else None,
    )
