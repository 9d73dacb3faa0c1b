"""Full-size models with random weights: seconds, FLOP/s and memory of an iteration."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from spo.command_line.config_files import load_config
from spo.command_line.flags import changed
from spo.costs.benchmark import ITERATION, run_iteration
from spo.costs.count import count_costs
from spo.costs.load import META, Models, load_models
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, SCORING, TRAINING, Meter, flop_counter
from spo.costs.unloaded_scorers import local_folder, unloaded_scorer
from spo.errors import first_line
from spo.gpu_check.card import median_seconds
from spo.gpu_check.checks import Place
from spo.gpu_check.official import official_arithmetic
from spo.gpu_check.profiling import profile
from spo.method.build import Recipe, read_recipe
from spo.models.device import speed_up
from spo.types import Conditioning, PreferencePairs

# A rollout of the config's prompts and candidates that is shorter: 4 of its 16 comparisons.
SHORT = "sample.num_steps=6,sample.branch_from=2"
SMALL = (
    "sample.num_steps=4,sample.branch_from=1,sample.batch_size=2,sample.global_batch_size=None,"
    "train.batch_size=4,train.global_batch_size=None"
)
FAST = "sample.decoder={},train.ema_prediction=rollout,preference.dtype=float16"
TAESD, SMALL_DECODER = "madebyollin/taesd", "assets/architectures/small/decoder"
EXACT, COMPILED, FASTEST, OFFICIAL = "exact", "exact, compiled", "fast, compiled", "official"
FIRST, MINIBATCH = "denoising, before branching", "minibatch"


def recipe_of(place: Place, path: str, *changes: str) -> Recipe:
    """Returns the recipe of a config with a short rollout, or of config/small.py in its place."""
    changes = ("tracker.name=none", SMALL if place.small else SHORT, *changes)
    return read_recipe(
        changed(load_config("config/small.py" if place.small else path), ",".join(changes))
    )


def full_size(place: Place, path: str) -> dict[str, Any]:
    """Measures exact mode, eager and compiled, fast mode, and the official arithmetic.

    A failure of one leaves the others. Loading and compiling leave the GPU to other checks, measuring
    does not.
    """
    bench = Bench(place, path)
    bench.attempt("loading", bench.load)
    bench.attempt("compilation", bench.compile)
    bench.attempt(EXACT, bench.measure_eager)
    bench.attempt(COMPILED, bench.measure)
    bench.attempt("loading for fast mode", bench.make_fast)
    bench.attempt(FASTEST, bench.measure)
    bench.attempt("loading for the official arithmetic", bench.make_official)
    bench.attempt(OFFICIAL, bench.measure)
    bench.attempt("costs", bench.count_costs)
    return bench.found


class Bench:
    """The models of a config at full size, and what has been found of them so far."""

    def __init__(self, place: Place, path: str) -> None:
        self.place, self.path, self.device = place, path, torch.device(place.device)
        self.recipe = recipe_of(place, path)
        self.variants: dict[str, Any] = {}
        self.found: dict[str, Any] = {"variants": self.variants, "failures": []}

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """Does some work and notes its result, if it has one, or its failure; on disk at once."""
        began = time.time()
        try:
            result = work()
        except Exception as error:  # whatever a kernel or a compiler raises
            self.found["failures"].append(f"{name}: {type(error).__name__}: {first_line(error)}")
            traceback.print_exc()
            result = None
        if name in (EXACT, COMPILED, FASTEST, OFFICIAL) and result is not None:
            self.variants[name] = result
        elif result is not None:
            self.found[name] = result
        seconds = {n: v["seconds"][ITERATION] for n, v in self.variants.items()}
        self.found["summary"] = ", ".join(f"{n} {value:.2f} s" for n, value in seconds.items())
        self.place.file(self.place.name).write_text(json.dumps(self.found, indent=1))
        print(f"{name}: {time.time() - began:.1f} s", json.dumps(result)[:2000], flush=True)

    def load(self) -> None:
        self.models = load_models(self.recipe, self.device, random=True)

    def compile(self) -> dict[str, float]:
        """Returns the seconds of the first calls; on a CPU compilation of a UNet takes minutes."""
        if not self.place.small:
            settings = replace(self.recipe.speed, compile_unet=True, compile_vae=True)
            speed_up(self.models.backbone, self.models.scorer, settings)
        return first_calls(self.models)

    def measure_eager(self) -> dict[str, Any]:
        with alone(self.place), torch.compiler.set_stance("force_eager"):
            measured = measure(self.models, self.place, None)
            self.flops = measured["flops_of_calls"]
            self.found["profile"] = profile(calls_of(self.models), self.device)
            if self.models.plan.minibatch_size == 1:
                two = replace(self.models, plan=replace(self.models.plan, minibatch_size=2))
                call = calls_of(two)[MINIBATCH]
                self.found["seconds_of_two_pairs"] = median_seconds(call, self.device, 2, 1)
        return measured

    def measure(self) -> dict[str, Any]:
        """Measures the models, whose calls take the FLOPs of `self.flops`."""
        with alone(self.place):
            return measure(self.models, self.place, self.flops)

    def make_fast(self) -> None:
        """Turns the models into those of fast mode: the UNet stays, as it was compiled."""
        decoder = SMALL_DECODER if self.place.small else TAESD
        recipe = recipe_of(self.place, self.path, FAST.format(decoder))
        backbone, learner = self.models.backbone, self.models.learner
        folder = local_folder(recipe.model.decoder, "taesd", "sample.decoder")
        backbone.decoder = backbone._load_decoder(folder).to(self.device)
        if not self.place.small:
            backbone.decoder.decoder.compile(dynamic=False)
        self.flops = {k: v for k, v in self.flops.items() if k not in (DECODING, MINIBATCH)}
        learner.settings = replace(learner.settings, ema_prediction="rollout")
        own = self.models.recipe.collect
        collect = replace(own, pairs=replace(own.pairs, keep_predictions=True))
        self.models = replace(
            self.models,
            scorer=unloaded_scorer(recipe.scorer, self.device, recipe.run.family),
            recipe=replace(self.models.recipe, collect=collect),
        )
        first_calls(self.models)

    def make_official(self) -> None:
        del self.models
        torch.compiler.reset()  # holds memory, too
        gc.collect()
        torch.cuda.empty_cache()
        self.flops = self.variants[EXACT]["flops_of_calls"]
        self.models = official_arithmetic(load_models(self.recipe, self.device, random=True))

    def count_costs(self) -> dict[str, Any]:
        return asdict(count_costs(load_models(self.recipe, META), [TRAINING]))


@contextlib.contextmanager
def alone(place: Place) -> Iterator[None]:
    """Within the context no other check measures; frees the memory that is not in use."""
    with (place.out / "measuring.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


def first_calls(models: Models) -> dict[str, float]:
    """Returns the seconds of each first call, which compile what is to be compiled."""
    seconds = {}
    for name, call in calls_of(models).items():
        began = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - began
        print("first", name, seconds[name], flush=True)
    torch.cuda.empty_cache()
    return seconds


def measure(models: Models, place: Place, flops: Mapping[str, int] | None) -> dict[str, Any]:
    """Returns seconds and rates of the calls and of one iteration, and its peak memory.

    `flops` are those of the calls, None to count them here, which compiled code does not allow.
    """
    device, calls = torch.device(place.device), calls_of(models)
    counted, seconds = {}, {}
    for name, call in calls.items():
        with flop_counter() if flops is None else contextlib.nullcontext() as counter:
            call()
        counted[name] = flops.get(name) if counter is None else counter.get_total_flops()
        seconds[name] = median_seconds(call, device, repeats=1 if place.small else 3, warm_up=1)
    found: dict[str, Any] = {"flops_of_calls": counted}
    found["calls"] = {name: {"seconds": each} for name, each in seconds.items()}
    for name in filter(counted.get, counted):
        found["calls"][name]["tflops"] = counted[name] / seconds[name] / 1e12
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
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
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
