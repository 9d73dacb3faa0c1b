"""Replays recorded runs of the official code through the functions that training calls.

Of a trace's tensors only the initial LoRA enters the computation; prompts, seeds and settings come from
its meta.json.
"""

import json
import math
from pathlib import Path
from unittest import mock

import torch
from ml_collections import ConfigDict
from safetensors.torch import load_file
from torch import Tensor

from spo.command_line.config_files import BASE, load_config
from spo.method import losses
from spo.method.build import build_learner, read_recipe
from spo.method.collect import Collected, collect_rollout
from spo.models.device import set_up_device
from spo.scorers import load_scorer
from spo.types import PreferencePairs

CPU = torch.device("cpu")
TOLERANCES = {
    "timesteps": 0,
    "permutation": 0,
    "minibatches": 0,
    "latents": 5e-4,
    "directions": 5e-4,
    "next_latents": 5e-4,
    "token_ids": 0,
    "predictions": 5e-4,
    "scores": 5e-3,
    "losses": 2e-5,
    "terms": 2e-5,
    "policy": 2e-4,
    "ema": 2e-4,
}
# Terms of SPO and LPO are log-densities, whose scale is 1 / sigma^2. A loss of LPO multiplies their
# rounding by beta, up to 500; the LoRA moves by it.
OWN_TOLERANCES = {
    "gradspo": {},
    "spo": {"terms": 1e-3},
    "lpo": {"terms": 5e-5, "policy": 5e-4},
}
LPO_LOSS_BY_BETA = 2e-6


def tolerances(config: ConfigDict) -> dict[str, float]:
    """Returns the largest deviation that counts as equal, by quantity."""
    found = TOLERANCES | OWN_TOLERANCES[config.algorithm]
    if config.algorithm == "lpo":
        found["losses"] = LPO_LOSS_BY_BETA * config.train.beta
    return found


def trace_config(meta: dict, models: Path) -> ConfigDict:
    """Returns this project's config for the settings of a trace."""
    recorded = dict(meta["config"])
    config = load_config(BASE)
    config.lora.rank = recorded.pop("lora_rank")
    config.pretrained.model = str(models / meta["base_model"])
    if "lrm" in meta:
        judge, sample = recorded.pop("lrm"), dict(recorded["sample"])
        recorded["sample"] = sample
        # The official code ignores the one or the other.
        by_schedule = sample["threshold_schedule"] is not None
        unused = ("threshold",) if by_schedule else ("threshold_min", "threshold_max")
        sample |= dict.fromkeys(unused)
        config.preference.scorer = "latent_reward"
        config.preference.kwargs = {
            "checkpoint": str(models / meta["lrm"]),
            "base": str(models / meta["base_model"]),
            "guidance_scale": float(judge["guidance_scale"]),
            "guide_stages": judge["multi_scale_cfg"],
        }
    else:
        config.preference.checkpoint = str(models / meta["preference_checkpoint"])
        config.preference.backbone = str(models / meta["preference_backbone"])
        config.preference.processor = str(models / meta["preference_backbone"])
    with config.ignore_type():  # JSON does not tell 10 from 10.0
        config.lock().update(recorded)
    return config


class Replay:
    """A learner in the state in which a trace begins, to be compared with the trace."""

    def __init__(self, trace: Path, models: Path, device: torch.device = CPU) -> None:
        self.meta = json.loads((trace / "meta.json").read_text())
        self.trace = load_file(trace / "trace.safetensors")
        self.config = config = trace_config(self.meta, models)
        self.recipe = read_recipe(config)
        set_up_device(device, allow_tf32=False)
        self.backbone = self.recipe.load_backbone(device)
        self.scorer = load_scorer(self.recipe.scorer, device)
        unet, accumulation = self.backbone.unet, config.train.gradient_accumulation_steps or 1
        lora = self.recipe.lora.add_to(unet, seed=0)
        lora.assign(self.recorded("init.policy."))
        self.learner = build_learner(self.recipe, self.backbone, unet, lora, accumulation)
        if self.learner.ema is not None:
            for name, tensor in self.recorded("init.ema.").items():
                self.learner.ema[name].copy_(tensor)

    def recorded(self, prefix: str) -> dict[str, Tensor]:
        """Returns the trace's tensors whose names start with `prefix`, by the rest of the name."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.trace.items()
            if name.startswith(prefix)
        }

    def run(self) -> list[dict[str, float]]:
        """Returns the deviations of every rollout."""
        return [self.rollout(index) for index in range(len(self.meta["rollouts"]))]

    def rollout(self, index: int) -> dict[str, float]:
        """Replays a rollout and its training; returns the largest deviations by quantity."""
        recorded, spec = self.recorded(f"it{index}."), self.meta["rollouts"][index]
        prompts, generator = spec["prompts"], torch.Generator().manual_seed(spec["seed"])
        with self.learner.drawing_network():
            sampler, settings = self.learner.sampler, self.recipe.collect
            drawn_with = self.backbone, self.scorer, sampler, settings
            rows = torch.arange(len(prompts), device=self.backbone.device)
            collected = collect_rollout(*drawn_with, prompts, rows, generator)
        pairs, deviations = collected.pairs, self.compare_pairs(collected, recorded)
        if self.config.algorithm == "lpo":
            copies = self.config.sample.num_candidates
            ids = self.scorer.tokenize(prompts)
            for name, mine in zip(("lrm_input_ids", "lrm_input_ids_2"), ids, strict=False):
                expected = recorded[f"in.{name}"]
                worst(deviations, "token_ids", deviation(mine.repeat(copies, 1), expected))
        permutation = torch.randperm(len(pairs), generator=generator)
        deviations["permutation"] = deviation(permutation, recorded["perm"])
        self.train(pairs.select(permutation.to(rows.device)), recorded, deviations)
        after = {"policy": self.learner.lora.parameters, "ema": self.learner.ema}
        for name, weights in after.items():
            for key, expected in self.recorded(f"it{index}.after.{name}.").items():
                worst(deviations, name, deviation(weights[key], expected))
        return deviations

    def compare_pairs(self, collected: Collected, recorded: dict[str, Tensor]) -> dict[str, float]:
        pairs = collected.pairs
        deviations: dict[str, float] = {}
        timesteps = recorded["rollout.timesteps"].flatten()
        deviations["timesteps"] = deviation(pairs.timesteps, timesteps)
        expected = recorded["rollout.current_latents"]
        shared = pairs.latents.shape[1] == 1  # the SDXL traces keep a shared x_t twice
        mine = pairs.latents.expand(-1, expected.shape[1], -1, -1, -1) if shared else pairs.latents
        deviations["latents"] = deviation(mine, expected)
        if self.config.algorithm == "gradspo":
            # The direction g is entry 0; the SD1.5 trace keeps the raw noises under the other name.
            noise = "noise_sam" if "rollout.noise_sam" in recorded else "noise_added"
            expected = recorded[f"rollout.{noise}"][:, 0]
            deviations["directions"] = deviation(losses.direction(pairs), expected)
        else:
            expected = recorded["rollout.next_latents"]
            deviations["next_latents"] = deviation(pairs.next_latents, expected)
        scores = torch.cat([comparison.scores.flatten() for comparison in collected.comparisons])
        if self.config.algorithm == "gradspo" and self.config.sample.final_score_timestep == "t":
            # The official code scores the final images twice.
            scores = torch.cat([scores, collected.comparisons[-1].scores.flatten()])
        deviations["scores"] = deviation(scores, recorded["rollout.preference_score_logs"])
        return deviations

    def train(
        self, pairs: PreferencePairs, recorded: dict[str, Tensor], deviations: dict[str, float]
    ) -> None:
        """Trains on the pairs, and adds the deviations of losses, terms and predictions."""
        own_loss, size = self.learner.loss, self.config.train.batch_size
        self.learner.loss = mock.Mock(side_effect=own_loss)  # notes the predictions
        for index in range(math.ceil(len(pairs) / size)):
            batch = pairs.select(slice(index * size, (index + 1) * size))
            output = self.learner.train_minibatch(batch, index).output
            predictions = self.learner.loss.call_args.args[0]
            mine = {"loss": ("losses", output.loss)}
            for side in ("win", "lose"):
                mine[f"{side}_policy"] = ("terms", output.terms[f"{side}_policy"])
                mine[f"{side}_ref"] = ("terms", output.terms[f"{side}_reference"])
            mine["policy_noise_pred"] = ("predictions", predictions.policy[:, 0])
            mine["ref_noise_pred"] = ("predictions", predictions.reference[:, 0])
            if self.learner.ema is not None:
                mine["ema_noise_pred"] = ("predictions", predictions.ema[:, 0])
                mine["direction"] = ("directions", losses.direction(batch))
            for name, (quantity, value) in mine.items():
                expected = recorded.get(f"batch{index}.{name}")
                if expected is not None:
                    worst(deviations, quantity, deviation(value, expected))
        self.learner.loss = own_loss
        trained = sum(name.startswith("batch") and name.endswith(".loss") for name in recorded)
        deviations["minibatches"] = abs(trained - math.ceil(len(pairs) / size))


def deviation(mine: Tensor, expected: Tensor) -> float:
    """Returns the largest absolute difference, infinite for other shapes or values not finite."""
    mine = mine.detach().cpu()
    if mine.shape != expected.shape:
        return math.inf
    difference = (mine.double() - expected.cpu().double()).abs().flatten()
    return max(difference.nan_to_num(nan=math.inf).tolist(), default=0.0)


def worst(deviations: dict[str, float], name: str, value: float) -> None:
    deviations[name] = max(deviations.get(name, 0.0), value)


def failures(rollouts: list[dict[str, float]], limits: dict[str, float]) -> list[str]:
    """Returns a line for every quantity past its limit: "rollout 1: losses 3.0e-03 > 2e-05"."""
    parts = (past(f"rollout {i}", found, limits) for i, found in enumerate(rollouts))
    return [line for part in parts for line in part]


def past(part: str, deviations: dict[str, float], limits: dict[str, float]) -> list[str]:
    """Returns a line for every quantity of `part` past its limit."""
    return [
        f"{part}: {name} {value:.1e} > {limits[name]:g}"
        for name, value in deviations.items()
        if not value <= limits[name]
    ]


def replay_trace(trace: Path, models: Path, device: torch.device = CPU) -> dict:
    """Replays the trace of a folder; returns its deviations, and its failures if there are any."""
    torch.set_num_threads(1)  # sums in one order, whatever the number of cores
    replay = Replay(trace, models, device)
    rollouts = replay.run()
    failed = failures(rollouts, tolerances(replay.config))
    shown = [comparable(deviations) for deviations in rollouts]
    return {"trace": trace.name, "rollouts": shown, "failures": failed}


def comparable(deviations: dict[str, float]) -> dict[str, float | None]:
    """Returns deviations for JSON, which has no infinity: None is not comparable, a failure too."""
    return {k: v if math.isfinite(v) else None for k, v in deviations.items()}
