"""What makes the same arithmetic faster leaves the numbers as they are."""

import ctypes
import os
import platform
import re
from dataclasses import replace
from functools import partialmethod

import psutil
import pytest
import torch
from helpers import (
    add_tiny_lora,
    load_backbone,
    randn,
    random_weights,
    scorer_source,
    unet_output,
)
from torch import nn

from spo.costs import load, pair_agreement
from spo.errors import UserError
from spo.evaluation import rollout_picture
from spo.method import start
from spo.method.build import read_recipe
from spo.models.device import SpeedSettings, set_up_device, speed_up
from spo.models.lora import MergedLora
from spo.scorers import ImageScorer, load_scorer
from tests.small_runs import ROOT, small_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
PLAIN = SpeedSettings(
    channels_last=False,
    compile_unet=False,
    compile_vae=False,
    compile_scorer=False,
    cuda_graphs=False,
)


def what_models_say(backbone, scorer, lora):
    """Outputs of every network and pass, and gradients of the LoRA."""
    with MergedLora(lora).using(random_weights(lora, seed=1)):
        found = [unet_output(backbone)]
    with lora.using(None):
        found.append(unet_output(backbone))
    latents = randn(2, *backbone.latent_shape, seed=3)
    conditioning = backbone.encode_prompts(["a fox", "a whale"])
    timesteps = torch.tensor([751, 101])
    output = backbone.predict(backbone.unet, latents, timesteps, conditioning, 5.0)
    output.square().mean().backward()
    found += [output.detach(), *(p.grad.clone() for p in lora.parameters.values())]
    for parameter in lora.parameters.values():
        parameter.grad = None
    images = backbone.decode_candidates(latents)
    return [*found, images, scorer.score(images, scorer.encode_prompts(["a fox", "a whale"]), 301)]


@pytest.mark.parametrize(
    "change",
    [
        "channels_last",
        pytest.param("compile_unet", marks=pytest.mark.slow),
        "compile_vae",
        "compile_scorer",
    ],
)
def test_the_same_numbers(change, monkeypatch):
    """Traced as torch.compile traces, but run as traced: generating code would take minutes."""
    traced = []

    def backend(graph, _):
        traced.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    backbone, scorer = load_backbone("sd15"), load_scorer(scorer_source("step_aware_clip"), CPU)
    lora = add_tiny_lora(backbone)
    expected = what_models_say(backbone, scorer, lora)
    speed_up(backbone, scorer, replace(PLAIN, **{change: True}))
    found = what_models_say(backbone, scorer, lora)
    assert bool(traced) == change.startswith("compile")
    assert backbone.unet.conv_in.weight.is_contiguous() == (change != "channels_last")
    for mine, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-4, atol=2e-4)
    torch.compiler.reset()


def test_a_scorer_that_cannot_be_compiled():
    with pytest.raises(UserError, match="compile.scorer: ImageScorer has no method"):
        speed_up(load_backbone("sd15"), ImageScorer(), replace(PLAIN, compile_scorer=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept():
    assert hasattr(ctypes.CDLL(None), "mallopt")
    set_up_device(CPU)
    process = psutil.Process()
    held = torch.ones(50_000_000)  # 200 MB
    during = process.memory_info().rss
    del held
    assert during - process.memory_info().rss < 100e6


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_of_a_gpu(deterministic, monkeypatch):
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark
    monkeypatch.delenv(WORKSPACE, raising=False)
    try:
        for allow_tf32 in (True, False):
            set_up_device(GPU, allow_tf32, deterministic)
            assert products.allow_tf32 == convolutions.allow_tf32 == allow_tf32
            assert convolutions.benchmark != deterministic
            assert torch.are_deterministic_algorithms_enabled() == deterministic
            assert os.environ.get(WORKSPACE) == (":4096:8" if deterministic else None)
        monkeypatch.setenv(WORKSPACE, ":16:8")
        set_up_device(GPU, True, deterministic)
        assert os.environ[WORKSPACE] == ":16:8"
    finally:
        products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark = before
        torch.use_deterministic_algorithms(False)


def take_device(name, recipe, config):
    if name == "start":
        start.train(config)
    elif name == "load":
        load.load_models(recipe, CPU)
    elif name == "pair_agreement":
        pair_agreement.compare_judges({"config": recipe}, 1)
    else:
        rollout_picture.draw_rollout(recipe, "a fox", "", seed=0)


@pytest.mark.parametrize("module", [start, load, pair_agreement, rollout_picture])
def test_a_device_is_set_up_as_the_config_says(module, tmp_path, monkeypatch):
    def stop(*how):
        raise LookupError(*how)

    config = small_config(tmp_path / "run", allow_tf32=False, deterministic=True)
    monkeypatch.setattr(module, "set_up_device", stop)
    with pytest.raises(LookupError) as stopped:
        take_device(module.__name__.rpartition(".")[2], read_recipe(config), config)
    assert stopped.value.args == (CPU, False, True)


def test_whoever_takes_a_device_sets_it_up():
    texts = [path.read_text() for path in (ROOT / "spo").rglob("*.py")]
    takes = re.compile(r"= pick_device\(\)|with Workers\(")
    found = ["  set_up_device(" in text for text in texts if takes.search(text)]
    assert len(found) >= 6 and all(found), found
