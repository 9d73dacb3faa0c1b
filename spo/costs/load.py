"""Loads the models that an iteration runs on: with weights, with random ones, or with shapes only.

Without weights they are made from their config files: on a real device with random weights, on the meta
device with shapes only. Training's own code runs on them.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
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

from spo.costs.unloaded_scorers import META, local_folder, tokenizer_for, unloaded_scorer
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.launch.batch_plan import BatchPlan, plan_batches
from spo.method.build import Recipe, build_learner
from spo.method.learner import Learner
from spo.method.losses import SPO, GradSPO
from spo.models.backbone import Backbone
from spo.models.decoder import vae_without_weights
from spo.models.device import minibatch_unet, set_up_device, speed_up
from spo.models.loading import ModelSource, check_source, freeze
from spo.scorers import Scorer, check_scorer, load_scorer


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
    A base model, scorer or decoder that is not a local folder then has the published architecture:
    SD1.5's or SDXL's by its family, PickScore's, TAESD's. Raises UserError for a file that training
    would refuse.
    """
    run, plan = recipe.run, plan_batches(recipe.config, 1)
    set_up_device(device, run.allow_tf32, run.deterministic)
    source, kind, unloaded = recipe.model, Backbone, random or device == META
    if unloaded:
        source = ModelSource(
            local_folder(source.model, run.family, "pretrained.model"),
            vae=source.vae and local_folder(source.vae, f"{run.family}/vae", "pretrained.vae"),
            decoder=source.decoder and local_folder(source.decoder, "taesd", "sample.decoder"),
            decodes=source.decodes,
        )
        kind = MetaBackbone if device == META else UnloadedBackbone
    configs = check_source(source, run.family)
    if not unloaded:
        check_scorer(recipe.scorer, run.family, configs)
    model = kind(source, run.family, run.mixed_precision, device)
    lora = recipe.lora.add_to(model.unet, seed=0)
    if unloaded:
        scorer = unloaded_scorer(recipe.scorer, device, run.family)
    else:
        scorer = load_scorer(recipe.scorer, device)
    unet = minibatch_unet(model, recipe.speed)
    learner = build_learner(recipe, model, unet, lora, plan.accumulation_steps)
    ends = {"threshold_schedule": None, "threshold_min": None, "threshold_max": None}
    pairs = replace(recipe.collect.pairs, threshold=-1.0, **ends)
    collect = replace(recipe.collect, pairs=pairs)
    if run.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if device == META:
        # There are no numbers. GradScaler branches on them; its cost is one pass over the gradients.
        learner.scaler = torch.amp.GradScaler(enabled=False)
        if not isinstance(learner.loss, GradSPO | SPO):  # a user's own loss may branch, too
            learner.loss = GradSPO(10.0, 0.1, 0.5) if learner.loss.uses_ema else SPO(10.0, 0.1)
        # Images and latents are independent: one by one they cost what they cost together.
        collect = replace(collect, decode_batch_size=1, score_batch_size=1)
    else:
        speed_up(model, scorer, recipe.speed)
    return Models(model, scorer, learner, replace(recipe, collect=collect), plan)


class UnloadedBackbone(Backbone):
    """A base model made from the config files of a diffusers folder."""

    def _load(self, source: ModelSource) -> DiffusionPipeline:
        folder = Path(source.model)
        index = json.loads((folder / "model_index.json").read_text())
        options = {k: v for k, v in index.items() if not isinstance(v, list) and k[0] != "_"}
        try:
            parts = {k: self._part(folder / k, *v) for k, v in index.items() if isinstance(v, list)}
            if not source.decodes:
                parts["vae"] = vae_without_weights(parts["vae"].config)
            elif source.vae is not None:
                parts["vae"] = self._part(Path(source.vae), "diffusers", "AutoencoderKL")
        except LOAD_ERRORS as error:
            where = f"{source.model!r} (vae {source.vae!r}) cannot be read ({first_line(error)})"
            raise UserError(f"pretrained: a config file of {where}.") from error
        for name in [name for name in parts if name.startswith("tokenizer")]:
            encoder = parts[name.replace("tokenizer", "text_encoder")]
            parts[name] = tokenizer_for(encoder)
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

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options = {"attn_mask": attn_mask, "scale": scale}
        return attention(query, key, value, dropout_p, is_causal, **options)[0]

    with (
        mock.patch.object(F, "scaled_dot_product_attention", fused),
        mock.patch.object(Tensor, "nonzero", every_index),
    ):
        yield
