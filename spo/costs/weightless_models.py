"""The models of a config without its weights: on the meta device, where tensors have shapes alone, or
on a real one with random weights.

What runs on them is training's own code. What differs is said at `_TOKENIZER`, `build_models`,
`count_models`, `meta_kernels` and `_autocast`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import DiffusionPipeline
from ml_collections import ConfigDict
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from spo.command_line.config_files import REPO_ROOT
from spo.costs.meter import Models, replaced, with_every_pair
from spo.errors import LOAD_ERRORS, UserError, first_line
from spo.hub import is_hub_id
from spo.method import build
from spo.method.losses import LOSSES
from spo.models import backbone
from spo.models.backbone import Backbone, ModelSource
from spo.scorers import Scorer, ScorerSource, load_scorer
from spo.scorers.clip import CLIPInputs, clip_config, weight_dtype
from spo.scorers.pickscore import PickScore
from spo.scorers.step_aware_clip import StepAwareCLIP, StepAwareScorer

ARCHITECTURES = REPO_ROOT / "assets" / "architectures"
# It pads to the length that a model wants: which tokens these are costs nothing.
_TOKENIZER = str(REPO_ROOT / "assets" / "tiny" / "clip")
META = torch.device("meta")
SCORER = "scorer"  # the preference model's name among the networks


@dataclass(frozen=True)
class UnloadedModels(Models):
    """Models, and the networks whose weights would be in memory, by their names."""

    networks: Mapping[str, nn.Module]


def build_models(
    config: ConfigDict, device: torch.device, accumulation_steps: int = 1
) -> UnloadedModels:
    """Base model, scorer and learner of `config` on `device`; nothing is downloaded.

    A base model, CLIP or decoder that is no folder here has the architecture of the published one:
    SD1.5's or SDXL's by its family, PickScore's, TAESD's. Every comparison makes a pair. Weights are
    made on the device in their own dtype. Raises UserError for what is wrong with the config.
    """
    build.check(config)
    source = build.rollout_source(config)
    folder = _folder(source.model, config.family, "pretrained.model")
    vae = source.vae and _folder(source.vae, f"{config.family}/vae", "pretrained.vae")
    decoder = source.decoder and _folder(source.decoder, "taesd", "sample.decoder")
    source = ModelSource(folder, vae=vae, decoder=decoder)
    backbone.check_source(source, config.family)
    kind = MetaBackbone if device.type == "meta" else UnloadedBackbone
    model = kind(source, config.family, config.mixed_precision, device)
    lora = build.build_lora(config, model.unet, seed=0)
    learner = build.build_learner(config, model, model.unet, lora, accumulation_steps)
    collect, networks = with_every_pair(build.collect_settings(config)), model.networks()
    scorer_source = build.scorer_source(config)
    if scorer_source.scorer in _SCORERS:
        networks[SCORER] = clip = _preference_model(scorer_source, device)
        scorer = _SCORERS[scorer_source.scorer][1](clip, _inputs(clip), device)
    else:
        scorer = _FreeScorer() if device == META else load_scorer(scorer_source, device)
    return UnloadedModels(model, scorer, learner, collect, networks)


def count_models(config: ConfigDict) -> UnloadedModels:
    """The models of `config` on the meta device, to be used within `meta_kernels`."""
    models = build_models(config, META)
    # It decides by numbers, and there are none; what it costs is one pass over the gradients.
    models.learner.scaler = torch.amp.GradScaler(enabled=False)
    objective = models.learner.objective
    if objective not in LOSSES.values():  # a user's own may look at numbers, too
        like = "gradspo" if objective.uses_ema else "spo"
        models.learner.objective = replace(objective, loss=LOSSES[like].loss)
    # Images are independent: one after the other they cost what they cost at once.
    return replace(models, collect=replace(models.collect, decode_batch_size=1))


def _folder(name: str, published: str, key: str) -> str:
    """`name` where it is a folder; for a Hub id that of the published architecture."""
    if Path(name).is_dir():
        return name
    if not is_hub_id(name):
        raise UserError(f"{key}: {name!r} is neither a folder nor a Hub id user/name.")
    return str(ARCHITECTURES / published)


_SCORERS = {
    "step_aware_clip": (StepAwareCLIP, StepAwareScorer),
    "pickscore": (CLIPModel, PickScore),
}


class _FreeScorer(Scorer):
    """In the place of a scorer of the user's own, which may not run on shapes alone."""

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        return torch.empty(len(prompts), 1, device=META)

    def score(self, images: Tensor, prompt_features: Tensor, timestep: int) -> Tensor:
        return torch.empty(len(images), device=META)


def _preference_model(source: ScorerSource, device: torch.device) -> StepAwareCLIP | CLIPModel:
    clip = clip_config(_folder(source.backbone, "clip_h", "preference.backbone"))
    dtype = weight_dtype(source.dtype)
    with _made_on(device, dtype):
        network = _SCORERS[source.scorer][0](clip)
    return network.to(dtype).requires_grad_(False).eval()


def _inputs(clip: StepAwareCLIP | CLIPModel) -> CLIPInputs:
    config = getattr(clip, "model", clip).config
    inputs = CLIPInputs(_TOKENIZER)
    inputs.tokenizer.model_max_length = config.text_config.max_position_embeddings
    inputs.prepare = replace(inputs.prepare, size=config.vision_config.image_size)
    return inputs


@contextlib.contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within the context new tensors are on `device`, those of floats in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


class UnloadedBackbone(Backbone):
    """A base model from the config files of a diffusers folder."""

    def _load(self, source: ModelSource) -> DiffusionPipeline:
        folder = Path(source.model)
        index = json.loads((folder / "model_index.json").read_text())
        options = {k: v for k, v in index.items() if not isinstance(v, list) and k[0] != "_"}
        classes = {k: v for k, v in index.items() if isinstance(v, list)}
        try:
            parts = {name: self._part(folder / name, *of) for name, of in classes.items()}
            if source.vae is not None:
                parts["vae"] = self._part(Path(source.vae), "diffusers", "AutoencoderKL")
        except LOAD_ERRORS as error:
            raise UserError(
                f"pretrained: a config file of {source.model!r} (vae {source.vae!r}) cannot be read "
                f"({first_line(error)})."
            ) from error
        for name in [name for name in parts if name.startswith("tokenizer")]:
            encoder = parts[name.replace("tokenizer", "text_encoder")]
            parts[name] = CLIPTokenizer.from_pretrained(
                _TOKENIZER, model_max_length=encoder.config.max_position_embeddings
            )
        pipe = getattr(diffusers, index["_class_name"])(**parts, **options)
        return backbone.freeze(pipe, self.family, self.dtype)

    def _load_decoder(self, name: str) -> nn.Module:
        tiny = self._part(Path(name), "diffusers", "AutoencoderTiny")
        return tiny.requires_grad_(False).eval()

    def _part(self, folder: Path, library: str | None, name: str | None):
        """The module or scheduler that a class of diffusers or transformers makes of a config file."""
        if library == "diffusers":
            kind = getattr(diffusers, name)
            make, arguments = kind.from_config, kind.load_config(folder)
        elif library == "transformers" and (folder / "config.json").is_file():
            kind = getattr(transformers, name)
            make, arguments = kind, kind.config_class.from_pretrained(folder)
        else:
            return None  # tokenizers, and what training does without
        if not issubclass(kind, nn.Module):
            return make(arguments)
        with _made_on(self.device, self.dtype):
            module = make(arguments)
        # For what a config file made in another dtype; not diffusers' own `to`, which warns of that.
        return nn.Module.to(module, self.dtype)

    def networks(self) -> dict[str, nn.Module]:
        """Those of the pipeline, by their names there, and a decoder besides."""
        found = {k: v for k, v in self._pipe.components.items() if isinstance(v, nn.Module)}
        return found if self.decoder is self.vae else found | {"decoder": self.decoder}


class MetaBackbone(UnloadedBackbone):
    """One on the meta device, which torch.autocast does not know."""

    def autocast(self) -> contextlib.AbstractContextManager:
        is_low = self.dtype != torch.float32
        return _autocast(self.dtype) if is_low else contextlib.nullcontext()


@contextlib.contextmanager
def meta_kernels() -> Iterator[None]:
    """Within the context the meta device has what real ones have.

    Fused attention, which keeps no matrix of all tokens by all tokens; and a `nonzero` by which no
    element is zero, so that every prompt of a comparison makes a pair.
    """
    nonzero = Tensor.nonzero

    def every_index(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return nonzero(tensor)
        return torch.ones(tensor.shape).nonzero().to(META)

    with (
        replaced(F, "scaled_dot_product_attention", _fused_attention),
        replaced(Tensor, "nonzero", every_index),
    ):
        yield


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    options.pop("enable_gqa", None)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(query, key, value, attn_mask=attn_mask, **options)[0]


@contextlib.contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast as on CUDA, for the functions that a UNet calls; it does not know this device."""
    low = dict.fromkeys(("linear", "conv2d", "scaled_dot_product_attention"), dtype)
    full = dict.fromkeys(("group_norm", "layer_norm"), torch.float32)
    with contextlib.ExitStack() as stack:
        for name, of_inputs in (low | full).items():
            stack.enter_context(replaced(F, name, _casting(getattr(F, name), of_inputs)))
        yield


def _casting(function: Callable, dtype: torch.dtype) -> Callable:
    """`function` on inputs of `dtype`."""

    def cast(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float else value

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return call
