"""Loads the models that an iteration runs on: with weights, with random ones, or with shapes only.

Without weights they are made from their config files: on a real device with random weights, on the meta
device with shapes only. Training's own code runs on them.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import CLIPModel, CLIPTokenizer

from spo.command_line.config_files import REPO_ROOT
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import is_hub_id
from spo.launch.batch_plan import BatchPlan, plan_batches
from spo.method.build import Recipe, build_learner
from spo.method.learner import Learner
from spo.method.losses import SPO, GradSPO
from spo.models.backbone import Backbone
from spo.models.device import set_up_device, speed_up
from spo.models.loading import ModelSource, check_source, freeze
from spo.models.single_file import is_single_file, read_single_file
from spo.scorers import Scorer, ScorerSource, check_scorer, load_scorer
from spo.scorers.clip import CLIPInputs, clip_config, weight_dtype
from spo.scorers.pickscore import PickScore
from spo.scorers.step_aware_clip import StepAwareCLIP, StepAwareScorer

ARCHITECTURES = REPO_ROOT / "assets" / "architectures"
# The tokens themselves cost nothing; this tokenizer pads to the length that a model wants.
_TOKENIZER = str(REPO_ROOT / "assets" / "tiny" / "clip")
_SCORERS = {
    "step_aware_clip": (StepAwareCLIP, StepAwareScorer),
    "pickscore": (CLIPModel, PickScore),
}
META = torch.device("meta")


@dataclass(frozen=True)
class Models:
    """The models of an iteration on one process; every comparison makes a pair."""

    backbone: Backbone
    scorer: Scorer
    learner: Learner
    recipe: Recipe
    plan: BatchPlan


def load_models(recipe: Recipe, device: torch.device, random: bool = False) -> Models:
    """Returns the models of `recipe`, with a threshold that every comparison passes.

    `random` takes random weights and downloads nothing; on the meta device tensors have shapes only.
    A base model, CLIP or decoder that is not a local folder then has the published architecture:
    SD1.5's or SDXL's by its family, PickScore's, TAESD's. Raises UserError for a file that training
    would refuse.
    """
    run, plan = recipe.run, plan_batches(recipe.config, 1)
    set_up_device(device, run.allow_tf32)
    source, kind, make_scorer = recipe.model, Backbone, load_scorer
    if random or device == META:
        source = ModelSource(
            _folder(source.model, run.family, "pretrained.model"),
            vae=source.vae and _folder(source.vae, f"{run.family}/vae", "pretrained.vae"),
            decoder=source.decoder and _folder(source.decoder, "taesd", "sample.decoder"),
        )
        kind = MetaBackbone if device == META else UnloadedBackbone
        make_scorer = unloaded_scorer
    configs = check_source(source, run.family)
    if make_scorer is load_scorer:
        check_scorer(recipe.scorer, run.family, configs)
    model = kind(source, run.family, run.mixed_precision, device)
    lora = recipe.lora.add_to(model.unet, seed=0)
    scorer = make_scorer(recipe.scorer, device)
    learner = build_learner(recipe, model, model.unet, lora, plan.accumulation_steps)
    keep_all = {"threshold": -1.0, "threshold_schedule": None}
    keep_all |= {"threshold_min": None, "threshold_max": None}
    collect = replace(recipe.collect, pairs=replace(recipe.collect.pairs, **keep_all))
    if run.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if device == META:
        # There are no numbers. GradScaler branches on them; its cost is one pass over the gradients.
        learner.scaler = torch.amp.GradScaler(enabled=False)
        if not isinstance(learner.loss, GradSPO | SPO):  # a user's own loss may branch, too
            learner.loss = GradSPO(10.0, 0.1, 0.5) if learner.loss.uses_ema else SPO(10.0, 0.1)
        # Images are independent: one by one they cost what they cost together.
        collect = replace(collect, decode_batch_size=1)
    else:
        speed_up(model, scorer, recipe.speed)
    return Models(model, scorer, learner, replace(recipe, collect=collect), plan)


def _folder(name: str, published: str, key: str) -> str:
    """Returns a local folder, that of a file's architecture, or the published one for a Hub id."""
    if Path(name).is_dir():
        return name
    if is_single_file(name):
        return str(read_single_file(name, key).configs)
    if not is_hub_id(name):
        raise UserError(f"{key}: {name!r} is neither a folder nor a Hub id user/name.")
    return str(ARCHITECTURES / published)


def unloaded_scorer(source: ScorerSource, device: torch.device) -> Scorer:
    """Returns a scorer without its weights; on the meta device a user's own costs nothing."""
    if source.name not in _SCORERS:
        return _FreeScorer() if device == META else load_scorer(source, device)
    network, scorer = _SCORERS[source.name]
    config = clip_config(_folder(source.options["backbone"], "clip_h", "preference.backbone"))
    with device:
        clip = network(config)
    inputs = CLIPInputs(_TOKENIZER)
    inputs.tokenizer.model_max_length = config.text_config.max_position_embeddings
    inputs.prepare = replace(inputs.prepare, size=config.vision_config.image_size)
    dtype = weight_dtype(source.options["dtype"], "preference")
    return scorer(clip.to(dtype).requires_grad_(False).eval(), inputs, device)


class _FreeScorer(Scorer):
    """Stands for a user's own scorer, which may not run on shapes only."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.empty(len(prompts), 1, device=META)

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        return torch.empty(len(images), device=META)


class UnloadedBackbone(Backbone):
    """A base model made from the config files of a diffusers folder."""

    def _load(self, source: ModelSource) -> DiffusionPipeline:
        folder = Path(source.model)
        index = json.loads((folder / "model_index.json").read_text())
        options = {k: v for k, v in index.items() if not isinstance(v, list) and k[0] != "_"}
        try:
            parts = {k: self._part(folder / k, *v) for k, v in index.items() if isinstance(v, list)}
            if source.vae is not None:
                parts["vae"] = self._part(Path(source.vae), "diffusers", "AutoencoderKL")
        except LOAD_ERRORS as error:
            where = f"{source.model!r} (vae {source.vae!r}) cannot be read ({first_line(error)})"
            raise UserError(f"pretrained: a config file of {where}.") from error
        for name in [name for name in parts if name.startswith("tokenizer")]:
            encoder = parts[name.replace("tokenizer", "text_encoder")]
            parts[name] = CLIPTokenizer.from_pretrained(
                _TOKENIZER, model_max_length=encoder.config.max_position_embeddings
            )
        pipe = getattr(diffusers, index["_class_name"])(**parts, **options)
        return freeze(pipe, self.family, self.dtype)

    def _load_decoder(self, name: str) -> nn.Module:
        tiny = self._part(Path(name), "diffusers", "AutoencoderTiny")
        return tiny.requires_grad_(False).eval()

    def _part(self, folder: Path, library: str | None, name: str | None) -> Any:
        """Returns the module or scheduler of a config file; None for a part that training lacks."""
        if library == "diffusers":
            kind = getattr(diffusers, name)
            make, arguments = kind.from_config, kind.load_config(folder)
        elif library == "transformers" and (folder / "config.json").is_file():
            kind = getattr(transformers, name)
            make, arguments = kind, kind.config_class.from_pretrained(folder)
        else:
            return None
        if not issubclass(kind, nn.Module):
            return make(arguments)
        with self.device:
            module = make(arguments)
        # A config file may set a dtype of its own. diffusers' `to` would warn of the change.
        return nn.Module.to(module, self.dtype)

    def networks(self) -> dict[str, nn.Module]:
        """Returns the networks by their names in the pipeline, and a `decoder` if there is one."""
        found = {k: v for k, v in self._pipe.components.items() if isinstance(v, nn.Module)}
        return found if self.decoder is self.vae else found | {"decoder": self.decoder}


class MetaBackbone(UnloadedBackbone):
    """A base model on the meta device, which torch.autocast does not know."""

    def autocast(self) -> contextlib.AbstractContextManager:
        """Casts as torch.autocast does on CUDA, for the functions that a UNet calls."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        low = dict.fromkeys(("linear", "conv2d", "scaled_dot_product_attention"), self.dtype)
        full = dict.fromkeys(("group_norm", "layer_norm"), torch.float32)
        casting = {name: _casting(getattr(F, name), dtype) for name, dtype in (low | full).items()}
        return mock.patch.multiple(F, **casting)


def _casting(function: Callable, dtype: torch.dtype) -> Callable:
    def cast(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def meta_kernels() -> Iterator[None]:
    """Gives the meta device, within the context, two functions that real devices have.

    Fused attention, which keeps no matrix of all tokens by all tokens; and a `nonzero` that finds no
    zero, so that every comparison of a prompt makes a pair.
    """
    nonzero = Tensor.nonzero
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def every_index(tensor: Tensor) -> Tensor:
        return torch.ones(tensor.shape).nonzero().to(META) if tensor.is_meta else nonzero(tensor)

    def fused(*inputs: Tensor, enable_gqa: bool = False, **options: Any) -> Tensor:
        return attention(*inputs, **options)[0]

    with (
        mock.patch.object(F, "scaled_dot_product_attention", fused),
        mock.patch.object(Tensor, "nonzero", every_index),
    ):
        yield
