"""Full-size models with random weights: seconds, FLOP/s and memory of an iteration."""

from __future__ import annotations

import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from spo.command_line.config_files import load_config
from spo.command_line.flags import changed
from spo.costs.benchmark import PAIR_SHARE, run_iteration
from spo.costs.count import count_costs
from spo.costs.forecast import batch_sizes, bytes_beside
from spo.costs.load import META, Models, load_models, meta_kernels
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, SCORING, TRAINING, Meter, flop_counter
from spo.errors import first_line
from spo.gpu_check.card import median_seconds
from spo.gpu_check.checks import Place
from spo.gpu_check.official import OfficialScorer, official_arithmetic
from spo.gpu_check.profiling import profile
from spo.method.build import read_recipe
from spo.method.metrics import peak_memory_gib
from spo.types import Conditioning, PreferencePairs

# A rollout of the config's prompts and candidates that is shorter: 4 of its 16 comparisons.
SHORT = "sample.num_steps=6,sample.branch_from=2"
SMALL = (
    "sample.num_steps=4,sample.branch_from=1,sample.batch_size=2,sample.global_batch_size=None,"
    "train.batch_size=4,train.global_batch_size=None"
)
TAESD, SMALL_DECODER = "madebyollin/taesd", "assets/architectures/small/decoder"
FAST = (
    "sample.decoder={},sample.decode_batch_size=40,train.ema_prediction=rollout,"
    "preference.dtype=float16"
)
COMPILE = "compile.unet=true,compile.vae=true"
EXACT, FASTER, OFFICIAL, COMPILED = "exact", "fast", "official", "{}, compiled"
LAID_OUT = "exact, channels last"
PROMPTS = 40_000  # of a run: ten epochs of 4,000
FIRST, MINIBATCH = "denoising, before branching", "minibatch"


def full_size(place: Place, path: str) -> dict[str, Any]:
    """Measures exact mode, the official arithmetic, and what is faster; a failure leaves the others."""
    bench = Bench(place, path)
    bench.attempt(EXACT, bench.measure)
    bench.attempt(OFFICIAL, lambda: bench.measure(change=official_arithmetic))
    bench.attempt(FASTER, lambda: bench.measure(bench.fast))
    bench.attempt(LAID_OUT, lambda: bench.measure("channels_last=true"))
    bench.attempt("profile", bench.profile)
    bench.attempt("costs", bench.count_costs)
    return bench.found


def compiled(place: Place, path: str) -> dict[str, Any]:
    """Measures both modes compiled; on a CPU the decoder alone, as the UNet takes minutes."""
    bench, change = Bench(place, path), "compile.vae=true" if place.small else COMPILE
    bench.attempt(COMPILED.format(EXACT), lambda: bench.measure(change))
    bench.attempt(COMPILED.format(FASTER), lambda: bench.measure(f"{change},{bench.fast}"))
    bench.attempt("costs", bench.count_costs)
    return bench.found


class Bench:
    """The iteration of a config at full size, and what has been found of it so far."""

    def __init__(self, place: Place, path: str) -> None:
        self.place, self.device = place, torch.device(place.device)
        self.path = "config/small.py" if place.small else path
        self.fast = FAST.format(SMALL_DECODER if place.small else TAESD)
        self.variants: dict[str, Any] = {}
        self.found: dict[str, Any] = {"variants": self.variants, "failures": []}

    def attempt(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Does some work and notes its result or its failure, on disk at once."""
        began = time.time()
        to = self.found if name in ("profile", "costs") else self.variants
        try:
            to[name] = work()
        except Exception as error:  # whatever a kernel or a compiler raises
            self.found["failures"].append(f"{name}: {type(error).__name__}: {first_line(error)}")
            traceback.print_exc()
        hours = {name: variant["hours"] for name, variant in self.variants.items()}
        self.found["summary"] = "; ".join(f"{n} {value:.1f} h" for n, value in hours.items())
        self.place.file(self.place.name).write_text(json.dumps(self.found, indent=1))
        print(f"{name}: {time.time() - began:.1f} s", json.dumps(to.get(name))[:2000], flush=True)
        gc.collect()
        torch.cuda.empty_cache()

    def models(self, change: str = "") -> Models:
        """Returns the models of the config with a short rollout, or of config/small.py in its place."""
        size = SMALL if self.place.small else SHORT
        changes = ",".join(filter(None, ("tracker.name=none", size, change)))
        config = changed(load_config(self.path), changes)
        self.recipe = read_recipe(config)  # of the last models
        return load_models(self.recipe, self.device, random=True)

    def measure(
        self, settings: str = "", change: Callable[[Models], Models] = lambda models: models
    ) -> dict[str, Any]:
        began = time.time()
        models = change(self.models(settings))
        found = {"seconds_of_loading": time.time() - began} | measure(models, self.place)
        return found | {"hours": self.hours(models, found["calls"])}

    def hours(self, models: Models, calls: Mapping[str, Mapping[str, float]]) -> float:
        """Returns the hours of PROMPTS prompts on this GPU, by the config's own numbers of calls."""
        seconds = {name: call["seconds"] for name, call in calls.items()}
        sample, plan, collect = load_config(self.path).sample, models.plan, models.recipe.collect
        branching = sample.num_steps - sample.branch_from
        images = plan.slice_size * collect.rollout.num_candidates
        # The official code looks at the final images twice.
        looks = branching + isinstance(models.scorer, OfficialScorer)
        looks *= math.ceil(images / collect.decode_batch_size)
        minibatches = plan.slice_size * branching * PAIR_SHARE / plan.minibatch_size
        together = sample.branch_from * seconds[FIRST] + branching * seconds[DENOISING]
        together += (
            looks * (seconds[DECODING] + seconds[SCORING]) + minibatches * seconds[MINIBATCH]
        )
        return together * PROMPTS / plan.slice_size / 3600

    def add_rates(self, flops: Mapping[str, int]) -> None:
        """Adds to the calls of exact mode their TFLOP/s, and its share of the card's in products."""
        card = self.place.file("card")
        peak = json.loads(card.read_text())["tflops_16_bit"] if card.is_file() else float("nan")
        for name in (EXACT, COMPILED.format(EXACT)):
            for call, found in self.variants.get(name, {}).get("calls", {}).items():
                found["tflops"] = flops[call] / found["seconds"] / 1e12
                found["share_of_peak"] = found["tflops"] / peak

    def profile(self) -> dict[str, Any]:
        return profile(calls_of(self.models()), self.device)

    def count_costs(self) -> dict[str, Any]:
        """Counts on shapes; the memory of the largest part is what the launcher foretells."""
        self.device = META
        models = self.models()
        costs = count_costs(models, [TRAINING])
        sizes = batch_sizes(self.recipe, models.plan, costs, TRAINING)
        self.add_rates(count_calls(models, sizes[DECODING]))
        beside = bytes_beside(costs, sizes, self.recipe.speed.cuda_graphs)
        needed = max(costs.bytes_of(part, size) + beside[part] for part, size in sizes.items())
        return asdict(costs) | {"estimated_gib": needed / 2**30}


def measure(models: Models, place: Place) -> dict[str, Any]:
    """Returns seconds and rates of the calls and of one iteration, and its peak memory."""
    device, calls = torch.device(place.device), {}
    for name, call in calls_of(models).items():
        first = median_seconds(call, device, repeats=1, warm_up=0)  # compiles or records
        seconds = median_seconds(call, device, repeats=1 if place.small else 3, warm_up=1)
        calls[name] = {"seconds_of_first": first, "seconds": seconds}
        print(name, calls[name], flush=True)
    found: dict[str, Any] = {"calls": calls}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    meter = Meter(device)
    work = run_iteration(models, meter, apart=True)
    each = models.recipe.collect.rollout.num_candidates
    images = work.pairs * each  # every comparison of a prompt makes a pair
    found |= {"seconds": dict(meter.seconds), "prompts": work.prompts, "pairs": work.pairs}
    rates = {k: images / meter.seconds[k] for k in (ROLLOUT, DECODING, SCORING)}
    found["images_per_second"] = rates
    if device.type == "cuda":
        found["allocated_gib"] = peak_memory_gib(device)
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def count_calls(models: Models, images: int) -> dict[str, int]:
    """Returns the FLOPs of each call; models on the meta device decode one of the `images`."""
    found = {}
    with meta_kernels():
        for name, call in calls_of(models).items():
            with flop_counter() as counter:
                call()
            times = images if name in (DECODING, SCORING) else 1
            found[name] = counter.get_total_flops() * times
    return found


def calls_of(models: Models) -> dict[str, Callable[[], object]]:
    """Returns the calls that an iteration is made of, at its sizes."""
    backbone, scorer, learner = models.backbone, models.scorer, models.learner
    settings, prompts, device = models.recipe.collect, models.plan.slice_size, backbone.device
    rows = prompts * settings.rollout.num_candidates
    images = min(rows, settings.decode_batch_size)
    conditioning = backbone.encode_prompts(["a prompt"] * prompts)
    features = scorer.encode_prompts(["a prompt"] * images)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, *backbone.latent_shape, generator=generator).to(device)
    pairs = random_pairs(models, conditioning, generator)
    beside = learner.merged is None
    seen = backbone.decode_candidates(latents[:images])

    @torch.no_grad()
    def denoise(n: int) -> None:
        given = conditioning.select(torch.arange(n, device=device) % prompts)
        with learner.drawing_network():
            guidance = settings.guidance_scale
            backbone.predict(backbone.unet, latents[:n], 501, given, guidance, beside)

    return {
        DENOISING: lambda: denoise(rows),
        FIRST: lambda: denoise(prompts),
        DECODING: lambda: backbone.decode_candidates(latents[:images]),
        SCORING: lambda: scorer.score(seen, features, 501),
        MINIBATCH: lambda: learner.train_minibatch(pairs, 0),
    }


def random_pairs(
    models: Models, conditioning: Conditioning, generator: torch.Generator
) -> PreferencePairs:
    """Returns a minibatch of pairs of random latents."""
    n, device = models.plan.minibatch_size, models.backbone.device
    rows = torch.arange(n, device=device)

    def draw(each: int) -> Tensor:
        noise = torch.randn(n, each, *models.backbone.latent_shape, generator=generator)
        return noise.to(device)

    return PreferencePairs(
        timesteps=torch.full_like(rows, 501),
        latents=draw(1),
        noises=draw(2),
        next_latents=draw(2),
        prompt_ids=rows,
        conditioning=conditioning.select(rows % len(conditioning)),
        sampler_epsilon=draw(1) if models.recipe.collect.pairs.keep_predictions else None,
    )
