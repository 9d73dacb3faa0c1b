"""Full-size models with random weights: seconds, FLOP/s and memory of an iteration."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spo.command_line.config_files import load_config
from spo.command_line.flags import changed
from spo.costs.benchmark import ITERATION, run_iteration
from spo.costs.count import count_costs
from spo.costs.load import META, Models, load_models
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, SCORING, TRAINING, Meter, flop_counter
from spo.errors import first_line
from spo.gpu_check.card import median_seconds
from spo.gpu_check.checks import Place
from spo.gpu_check.official import official_arithmetic
from spo.gpu_check.profiling import profile
from spo.method.build import read_recipe
from spo.types import Conditioning, PreferencePairs

FAST = "sample.decoder=madebyollin/taesd,train.ema_prediction=rollout"
VARIANTS = {
    "exact": "",
    "official arithmetic": "",
    "fast, channels_last": f"{FAST},preference.dtype=float16,channels_last=true",
    "channels_last": "channels_last=true",
    "fast": f"{FAST},preference.dtype=float16",
}
SMALL = (
    "sample.num_steps=4,sample.branch_from=1,sample.batch_size=2,sample.global_batch_size=None,"
    "train.batch_size=4,train.global_batch_size=None"
)
SMALL_DECODER = "assets/architectures/small/decoder"
MINIBATCH = "minibatch"
SECONDS_OF_A_CHOICE = 8
SECONDS_OF_A_VARIANT = 25  # less is not worth beginning one


def config_of(place: Place, path: str, change: str) -> Any:
    """Returns the recipe of a config at its own sizes, or of config/small.py in its place."""
    changes = ["tracker.name=none"]
    if place.small:
        path, change = "config/small.py", change.replace("madebyollin/taesd", SMALL_DECODER)
        changes.append(SMALL)
    changes += [change] if change else []
    return read_recipe(changed(load_config(path), ",".join(changes)))


def costs(place: Place, path: str) -> dict[str, Any]:
    """Counts the FLOPs and the memory of a config, to hold the measured ones against."""
    recipe = config_of(place, path, "")
    found = count_costs(load_models(recipe, META), [TRAINING])
    summary = f"{found.flops[ROLLOUT] / 1e12:.4g} TFLOP for the rollout of a prompt"
    return {"summary": summary, **asdict(found), "failures": []}


def full_size(place: Place, path: str) -> dict[str, Any]:
    """Measures the variants one after another; what is measured is on disk at once."""
    counted, variants = read_figures(place, f"costs {path}", lambda: costs(place, path)), {}
    found = {"costs": counted, "variants": variants, "failures": []}
    for name, change in VARIANTS.items():
        if place.seconds_left < SECONDS_OF_A_VARIANT:
            variants[name] = "left out for want of time"
            continue
        recipe = config_of(place, path, change)
        models = load_models(recipe, torch.device(place.device), random=True)
        if name == "official arithmetic":
            models = official_arithmetic(models)
        variants[name] = measure(models, place, counted, with_profile=name == "exact")
        print(name, json.dumps(variants[name]), flush=True)
        del models
        gc.collect()
        torch.cuda.empty_cache()
        (place.out / f"{path.split('/')[-1]}.json").write_text(json.dumps(found, indent=1))
    seconds = {n: v["seconds"][ITERATION] for n, v in variants.items() if isinstance(v, dict)}
    found["summary"] = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return found


def read_figures(place: Place, name: str, compute: Callable[[], dict]) -> dict[str, Any]:
    """Returns the figures of another check, computed here where it has not run."""
    file = place.file(name)
    return json.loads(file.read_text()) if file.is_file() else compute()


def measure(models: Models, place: Place, counted: dict, with_profile: bool) -> dict[str, Any]:
    """Returns seconds, rates and memory of the parts and of one iteration."""
    device = torch.device(place.device)
    calls = calls_of(models, device)
    found: dict[str, Any] = {"calls": {}}
    for name, call in calls.items():
        with flop_counter() as counter:
            call()
        seconds = median_seconds(call, device, repeats=1 if place.small else 3, warm_up=1)
        rate = counter.get_total_flops() / seconds / 1e12
        found["calls"][name] = {"seconds": seconds, "tflops": rate}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    meter = Meter(device)
    work = run_iteration(models, meter, apart=True)
    seconds, prompts = dict(meter.seconds), work.prompts
    images = prompts * counted["pairs"] * models.recipe.collect.rollout.num_candidates
    flops = {
        part: counted["flops"][part] * prompts for part in (ROLLOUT, DENOISING, DECODING, SCORING)
    }
    flops[TRAINING] = counted["flops"][TRAINING] * work.pairs
    found |= {"seconds": seconds, "prompts": prompts, "pairs": work.pairs, "images": images}
    found["images_per_second"] = {k: images / seconds[k] for k in (ROLLOUT, DECODING, SCORING)}
    found["tflops_of_exact_mode"] = {k: v / seconds[k] / 1e12 for k, v in flops.items()}
    if device.type == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    found["estimated_gib"] = estimate(counted, models)
    if with_profile:
        found["profile"] = profile(calls, device)
    return found


def estimate(counted: dict, models: Models) -> float:
    """Returns the GiB that the launcher's estimate says the largest part needs."""
    images = models.plan.slice_size * models.recipe.collect.rollout.num_candidates
    sizes = {
        DENOISING: models.plan.slice_size,
        DECODING: min(images, models.recipe.collect.decode_batch_size),
        TRAINING: models.plan.minibatch_size,
    }
    part = max(counted["peak_bytes"][part] * size for part, size in sizes.items())
    return (sum(counted["resident_bytes"].values()) + part) / 2**30


def calls_of(models: Models, device: torch.device) -> dict[str, Callable[[], object]]:
    """Returns the calls that an iteration is made of, at its sizes."""
    backbone, scorer, learner = models.backbone, models.scorer, models.learner
    settings, prompts = models.recipe.collect, models.plan.slice_size
    rows = prompts * settings.rollout.num_candidates
    images = min(rows, settings.decode_batch_size)
    conditioning = backbone.encode_prompts(["a prompt"] * prompts)
    of_candidates = conditioning.select(torch.arange(rows, device=device) % prompts)
    features = scorer.encode_prompts(["a prompt"] * images)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, *backbone.latent_shape, generator=generator).to(device)
    pairs = random_pairs(models, conditioning, generator)
    beside = models.learner.merged is None
    seen = backbone.decode_candidates(latents[:images])

    @torch.no_grad()
    def denoise() -> object:
        with learner.drawing_network():
            guidance = settings.guidance_scale
            return backbone.predict(backbone.unet, latents, 501, of_candidates, guidance, beside)

    return {
        DENOISING: denoise,
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


def compiled(place: Place, path: str) -> dict[str, Any]:
    """Measures the calls as they are, then compiled one by one: seconds of the first, and after it."""
    device = torch.device(place.device)
    models = load_models(config_of(place, path, ""), device, random=True)
    calls, found = calls_of(models, device), {"calls": {}, "failures": []}
    networks = {DENOISING: models.backbone.unet, DECODING: models.backbone.decoder.decoder}
    # On a CPU compilation of a UNet takes minutes.
    for name in (DECODING,) if place.small else (DENOISING, DECODING, MINIBATCH):
        if place.seconds_left < SECONDS_OF_A_VARIANT:
            break
        before = median_seconds(calls[name], device, repeats=3, warm_up=1)
        if name in networks:
            networks[name].compile(dynamic=False)
        first = median_seconds(calls[name], device, repeats=1, warm_up=0)
        after = median_seconds(calls[name], device, repeats=3, warm_up=1)
        found["calls"][name] = {"eager": before, "first": first, "compiled": after}
        print(name, found["calls"][name], flush=True)
    rates = {name: times["eager"] / times["compiled"] for name, times in found["calls"].items()}
    found["summary"] = ", ".join(f"{name} {rate:.2f} x" for name, rate in rates.items())
    return found


def switches(place: Place, path: str) -> dict[str, Any]:
    """Measures each call with kernels and layouts that one can choose, one choice after another."""
    device = torch.device(place.device)
    models = load_models(config_of(place, path, ""), device, random=True)
    calls, found = calls_of(models, device), {"choices": {}, "failures": []}
    for name, choice in choices(models, device).items():
        if place.seconds_left < SECONDS_OF_A_CHOICE:
            break
        try:
            with choice():
                repeats = 1 if place.small else 3
                found["choices"][name] = {
                    part: median_seconds(call, device, repeats, warm_up=1)
                    for part, call in calls.items()
                }
        except RuntimeError as error:  # a kernel that does not take these shapes
            found["choices"][name] = f"{type(error).__name__}: {first_line(error)}"
        print(name, found["choices"][name], flush=True)
    measured = {name: times for name, times in found["choices"].items() if isinstance(times, dict)}
    best = {part: min(measured, key=lambda name, p=part: measured[name][p]) for part in calls}
    found["summary"] = ", ".join(f"{part}: {name}" for part, name in best.items())
    return found


def choices(
    models: Models, device: torch.device
) -> dict[str, Callable[[], AbstractContextManager]]:
    """Returns contexts by name; layouts stay changed, and so come last."""
    cudnn, networks = torch.backends.cudnn, (models.backbone.unet, models.backbone.decoder)

    @contextmanager
    def searched(on: bool) -> Iterator[None]:
        before, cudnn.benchmark = cudnn.benchmark, on
        yield
        cudnn.benchmark = before

    @contextmanager
    def channels_last(on: bool) -> Iterator[None]:
        for network in networks:
            network.to(memory_format=torch.channels_last)
        models.scorer.channels_last()
        with searched(on):
            yield

    found = {"cudnn.benchmark off": partial(searched, False), "on": partial(searched, True)}
    if device.type == "cuda":
        kinds = (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        )
        found |= {f"attention {k.name}": partial(sdpa_kernel, [k, SDPBackend.MATH]) for k in kinds}
    layouts = {"off": partial(channels_last, False), "on": partial(channels_last, True)}
    return found | {f"channels_last, cudnn.benchmark {k}": v for k, v in layouts.items()}
