"""Replays recorded scores and training batches of the official latent reward models.

Of a trace's tensors enter what the official code was given: latents and timesteps; for training the
images, labels and timesteps of the pairs. The noise is drawn again from the recorded seed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from spo.command_line.config_files import SPM_BASE, load_config
from spo.method.replay import CPU, comparable, deviation, past
from spo.models.device import set_up_device
from spo.models.loading import family_of
from spo.preference.pair_learner import PreferenceLearner, TrainingPairs
from spo.preference.pair_recipe import build_preparation, build_scorer, read_pair_recipe
from spo.preference.preparation import PairNoise
from spo.scorers.latent_reward import tokenize, unit
from spo.scorers.latent_reward_scorer import load_latent_reward_scorer

TOLERANCES = {
    "scores": 5e-3,
    "image_features": 2e-3,
    "text_features": 1e-4,
    "noisy_latents": 1e-4,
    "unit_features": 1e-5,
    "loss": 1e-5,
    "gradients": 1e-3,  # norm of the difference over the norm, the largest of all parameters
}


def replay_latent_reward(trace: Path, models: Path, device: torch.device = CPU) -> dict:
    """Replays a trace of scores or of training; returns deviations by case or batch, and failures."""
    torch.set_num_threads(1)  # sums in one order, whatever the number of cores
    set_up_device(device, allow_tf32=False)
    meta = json.loads((trace / "meta.json").read_text())
    tensors = load_file(trace / "trace.safetensors")
    found = dict((_scores if "cases" in meta else _batches)(meta, tensors, models, device))
    failed = [line for part in found.items() for line in past(*part, TOLERANCES)]
    shown = {name: comparable(case) for name, case in found.items()}
    return {"trace": trace.name, "cases": shown, "failures": failed}


@torch.no_grad()
def _scores(
    meta: Mapping[str, Any], trace: Mapping[str, Tensor], models: Path, device: torch.device
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields the deviations of the scores of fixed latents, case by case."""
    for name, case in meta["cases"].items():
        scorer = load_latent_reward_scorer(
            device,
            "preference.kwargs",
            checkpoint=str(models / meta["lrm"]),
            base=str(models / meta["base_model"]),
            guidance_scale=float(case["guidance_scale"]),
            guide_stages=case["multi_scale_cfg"],
        )
        text = scorer.encode_prompts(meta["prompts"])
        given = (trace[name].to(device) for name in ("latents", "timesteps"))
        seen = *given, text, scorer.empty
        mine = {
            "scores": scorer.model.score(*seen),
            "image_features": scorer.model.image_features(*seen),
            "text_features": text.features,
        }
        expected = {quantity: trace[f"{name}.{quantity}"] for quantity in mine}
        expected["text_features"] = unit(expected["text_features"])
        yield name, {quantity: deviation(mine[quantity], expected[quantity]) for quantity in mine}


def _batches(
    meta: Mapping[str, Any], trace: Mapping[str, Tensor], models: Path, device: torch.device
) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields the deviations of a training's input, features, loss and gradients, batch by batch."""
    for index, batch in enumerate(meta["batches"]):
        own = {
            k.removeprefix(f"b{index}."): v for k, v in trace.items() if k.startswith(f"b{index}.")
        }
        yield f"batch {index}", _batch(meta, batch, own, models, device)


def _batch(
    meta: Mapping[str, Any],
    batch: Mapping[str, Any],
    trace: Mapping[str, Tensor],
    models: Path,
    device: torch.device,
) -> dict[str, float]:
    trace = {name: tensor.to(device) for name, tensor in trace.items()}
    images = torch.stack([trace["pixel_values_0"], trace["pixel_values_1"]], dim=1)
    recipe = read_pair_recipe(_config(meta, batch, models, images.shape[-1]))
    preparation = build_preparation(recipe, device)
    scorer = build_scorer(recipe, preparation.backbone)
    learner = PreferenceLearner(scorer, scorer, recipe.train, device, torch.float32)
    scorer.model.logit_scale.data.fill_(batch["logit_scale"])
    noise = _draw_noise(batch["seed"], trace["timesteps"], preparation.latent_shape)
    latents = preparation.noisy_latents(images, noise)
    input_ids = tokenize(preparation.backbone.tokenizers.values(), batch["prompts"])
    input_ids = [ids.to(device) for ids in input_ids]
    weights = 1 / trace["num_examples_per_prompt"]
    weights = weights / weights.sum()
    pairs = TrainingPairs(latents, noise.timesteps, input_ids, trace["label_0"], weights)
    losses, _ = learner.backward(pairs, last=True)
    deviations = {
        "noisy_latents": deviation(latents, _by_pair(trace["noisy_latents"])),
        "loss": deviation((weights * losses).sum(), trace["loss"]),
    }
    with torch.no_grad():
        text, empty = (scorer.model.encode_text(ids) for ids in (input_ids, scorer.empty_ids))
        features = {"text_features": text.features}
        for i in (0, 1):
            found = scorer.model.image_features(latents[:, i], noise.timesteps, text, empty)
            features[f"image_{i}_features"] = unit(found)
    found = (deviation(value, trace[name]) for name, value in features.items())
    gradients = {_short(name): p.grad for name, p in scorer.learned().items()}
    off = (
        (gradients[_short(name.removeprefix("grad."))] - expected).norm() / expected.norm()
        for name, expected in trace.items()
        if name.startswith("grad.")
    )
    return deviations | {"unit_features": max(found), "gradients": max(map(float, off))}


def _config(
    meta: Mapping[str, Any], batch: Mapping[str, Any], models: Path, image_size: int
) -> Any:
    """Returns the config of a training that starts from the recorded reward model."""
    family = family_of(str(models / meta["base_model"]), "base_model")
    config = load_config(f"config/lrm_{family}.py", SPM_BASE)
    changes = {
        "mixed_precision": "no",
        "pretrained.model": str(models / meta["base_model"]),
        "pretrained.vae": None,
        "preference.init_from": str(models / meta["lrm"]),
        "preference.guidance_scale": float(batch["guidance_scale"]),
        "preference.guide_stages": batch["multi_scale_cfg"],
        "data.image_size": image_size,
    }
    config.update_from_flattened_dict(changes)
    return config


def _draw_noise(seed: int, timesteps: Tensor, latent_shape: tuple[int, int, int]) -> PairNoise:
    """Draws as the official code did: the posteriors of all images, then noise.

    Its latents lie channels last in memory, and so does the noise drawn like them.
    """
    generator, shape = torch.Generator().manual_seed(seed), (2 * len(timesteps), *latent_shape)
    posterior = torch.randn(shape, generator=generator)
    noise = torch.empty(shape).to(memory_format=torch.channels_last).normal_(generator=generator)
    drawn = (_by_pair(part).to(timesteps.device) for part in (posterior, noise.contiguous()))
    return PairNoise(timesteps, *drawn)


def _by_pair(rows: Tensor) -> Tensor:
    """Turns rows of all images 0, then all images 1, into (n, 2, ...)."""
    return torch.stack(rows.chunk(2), dim=1)


def _short(name: str) -> str:
    """Returns a parameter's name without a level that some versions of transformers lack."""
    return name.replace("text_model.", "")
