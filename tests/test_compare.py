"""Variants in turn, and models with random weights."""

import json
import shutil
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import MODELS
from test_benchmark import CPU, LATENT_REWARD, SIZES, run_script, small_config

from spo.command_line.flags import FLAGS, changed, define_config, parse_flags
from spo.costs import benchmark
from spo.costs.benchmark import Measured, Work
from spo.costs.load import load_models
from spo.costs.meter import ROLLOUT, TRAINING
from spo.errors import UserError
from spo.method.build import read_recipe
from spo.models.backbone import Backbone

WORK = Work(flops={ROLLOUT: 6, TRAINING: 3}, prompts=2, pairs=10)


def without_weights(folder, family):
    """A copy of a tiny model's config files, and of no others."""

    def others(directory, names):
        return [n for n in names if "." in n and not n.endswith(".json")]

    return shutil.copytree(MODELS / f"tiny-{family}", folder / family, ignore=others)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision", "scorer"),
    [
        ("sd15", "no", "step_aware_clip"),
        ("sdxl", "bf16", "pickscore"),
        ("sdxl", "no", "latent_reward"),
    ],
)
def test_random_weights_run(tmp_path, family, precision, scorer):
    folder = without_weights(tmp_path, family)
    assert not list(folder.rglob("*.safetensors"))
    changes = {"preference.scorer": scorer, "sample.batch_size": 1}
    if scorer == "latent_reward":
        changes |= LATENT_REWARD[family]
    config = small_config(family, mixed_precision=precision, **changes)
    config.pretrained.model = str(folder)
    if scorer == "latent_reward":
        config.preference.kwargs.checkpoint = str(without_weights(tmp_path, f"lrm-{family}"))
    models = load_models(read_recipe(config), CPU, random=True)
    assert type(models.backbone).autocast is Backbone.autocast
    dtypes = {p.dtype for p in models.backbone.vae.parameters()}
    assert dtypes == {models.backbone.dtype} and torch.get_default_dtype() is torch.float32
    work = benchmark.count_work(models)
    real = small_config(family, mixed_precision=precision, **changes)
    measured = benchmark.count_work(load_models(read_recipe(real), CPU))
    assert work == measured
    assert work.pairs == 2 and all(work.flops[part] for part in (ROLLOUT, TRAINING))


def test_random_weights_without_a_finite_score():
    models = load_models(read_recipe(small_config()), CPU, random=True)
    models.backbone.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="no score is finite"):
        benchmark.count_work(models)


def test_rates_are_those_of_pairs_by_hand():
    def turn(rollout, training):
        return {ROLLOUT: rollout, TRAINING: training}

    baseline = Measured(WORK, [turn([4.0, 6.0, 50.0], [1.0]), turn([3.0], [1.0])])
    # Twice the prompts and four times the pairs at once.
    work = replace(WORK, prompts=4, pairs=40)
    variant = Measured(work, [turn([6.0], [2.0]), turn([6.0], [8.0])])
    assert variant.ratios(ROLLOUT, baseline) == [4.0, 2.0]  # 10 in 6 s against 40 in 6 s; 10 in 3 s
    assert variant.ratios(TRAINING, baseline) == [2.0, 0.5]
    assert baseline.ratios(ROLLOUT, baseline) == [1.0, 1.0]
    assert baseline.seconds(ROLLOUT) == [4.0, 6.0, 50.0, 3.0]


@pytest.mark.slow
def test_variants_take_turns_and_one_is_in_memory(monkeypatch):
    order, alive = [], []
    memory = iter((5.0, 1.0, 7.0, 2.0))
    monkeypatch.setattr(benchmark, "peak_memory_gib", lambda device: next(memory))

    def load(config):
        models = load_models(read_recipe(config), CPU)
        assert not any(unet() for unet in alive)  # the last one's is gone
        alive.append(weakref.ref(models.backbone.unet))
        order.append(config.sample.batch_size)
        return models

    one, two = (small_config(**{"sample.batch_size": n, "sample.num_steps": 3}) for n in (1, 2))
    loaders = {"one": partial(load, one), "two": partial(load, two)}
    measured = benchmark.time_in_turns(loaders, rounds=2, repeats=2)
    assert order == [1, 2, 1, 2]
    assert (measured["one"].work.prompts, measured["two"].work.prompts) == (1, 2)
    assert [len(turn[ROLLOUT]) for turn in measured["two"].turns] == [2, 2]
    assert len(measured["two"].seconds(ROLLOUT)) == 4
    assert (measured["one"].peak_gib, measured["two"].peak_gib) == (7.0, 2.0)


@pytest.fixture
def parsed(monkeypatch):
    """The flag --config of a script that was called with one change."""
    monkeypatch.setattr(sys, "argv", ["test"])
    define_config("config/sd15.py")
    parse_flags(["test", "--config=config/sdxl.py", "--config.train.beta=3"])
    return FLAGS["config"].value


def test_changes_to_a_copy_of_the_config(parsed):
    modules = "lora.target_modules=('to_q','to_k')"
    other = changed(parsed, f"train.max_grad_norm=None,{modules},sample.batch_size=7")
    assert other.lora.target_modules == ("to_q", "to_k")
    assert (other.train.max_grad_norm, other.train.beta, other.sample.batch_size) == (None, 3, 7)
    assert (parsed.train.max_grad_norm, parsed.sample.batch_size) == (1.0, 2)
    assert changed(other, "train.max_grad_norm=2").train.max_grad_norm == 2
    for text, message in {
        "train.beta=x": "config: train.beta=x: expected float",
        "train.beta=None": "config: train.beta cannot be None",
        "config/no.py": "config/no.py",
        "train.bata=1": "unknown key train.bata; did you mean train.beta",
    }.items():
        with pytest.raises(UserError, match=message):
            changed(parsed, text)


def test_another_config_file_takes_what_the_command_line_sets(parsed):
    other = changed(parsed, "config/lpo_sdxl.py,sample.stop_at=7")
    assert (other.preference.scorer, other.train.beta) == ("latent_reward", 3)
    assert (other.sample.stop_at, parsed.sample.stop_at) == (7, 0)
    assert parsed.preference.scorer == "step_aware_clip"


@pytest.mark.slow
def test_command_line(tmp_path):
    folder, file = without_weights(tmp_path, "sd15"), tmp_path / "figures.json"
    sizes = [f"--config.{key}={value}" for key, value in (SIZES | {"sample.batch_size": 1}).items()]
    variant = "lora.rank=2,train.batch_size=1"
    result = run_script(
        "--config=tests/data/random_models.py",
        f"--config.pretrained.model={folder}",
        *sizes,
        "--random",
        f"--compare={variant}",
        "--rounds=2",
        "--repeats=1",
        f"--json={file}",
    )
    assert result.returncode == 0, result.stderr
    variants = json.loads(file.read_text())["variants"]
    assert set(variants) == {"baseline", variant}
    for name, figures in variants.items():
        assert 0.1 < figures["peak_memory_gib"] < 10
        row = figures["parts"][TRAINING]
        assert ("rate_of_baseline" in row) == (name == variant) and f"| {name} " in result.stdout
    row = variants[variant]["parts"][TRAINING]
    assert 0 < row["from"] <= row["rate_of_baseline"] <= row["to"]
    flops = [figures["parts"][TRAINING]["tflop"] for figures in variants.values()]
    assert flops[1] < flops[0]  # a LoRA of less
