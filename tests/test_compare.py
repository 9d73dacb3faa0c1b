"""Variants in turn, models with random weights, and where the time goes."""

import json
import shutil
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import MODELS
from test_benchmark import CPU, SIZES, run_script, small_config

from spo.command_line.flags import FLAGS, changed, define_config, parse_flags
from spo.costs import measure, variants
from spo.costs.measure import Work
from spo.costs.meter import EMA, ROLLOUT, TRAINING
from spo.costs.profile import profile_iteration
from spo.costs.variants import Measured, Turn
from spo.errors import UserError
from spo.launch.batch_plan import plan_batches
from spo.models.backbone import Backbone

WORK = Work(flops={}, copied_bytes={}, prompts=2, pairs=10, images=1)


def without_weights(folder, family):
    """A copy of a tiny model's config files, and of no others."""

    def others(directory, names):
        return [n for n in names if "." in n and not n.endswith(".json")]

    return shutil.copytree(MODELS / f"tiny-{family}", folder / family, ignore=others)


@pytest.mark.parametrize(
    ("family", "precision", "scorer"),
    [("sd15", "no", "step_aware_clip"), ("sdxl", "bf16", "pickscore")],
)
def test_random_weights_run(tmp_path, family, precision, scorer):
    folder = without_weights(tmp_path, family)
    assert not list(folder.rglob("*.safetensors"))
    changes = {"preference.scorer": scorer, "sample.batch_size": 1}
    config = small_config(family, mixed_precision=precision, **changes)
    config.pretrained.model = str(folder)
    plan = plan_batches(config, 1)
    models = measure.load_models(config, plan.accumulation_steps, CPU, random=True)
    assert type(models.backbone).autocast is Backbone.autocast
    dtypes = {p.dtype for p in models.backbone.vae.parameters()}
    assert dtypes == {models.backbone.dtype} and torch.get_default_dtype() is torch.float32
    work = measure.count_work(models, plan)
    real = small_config(family, mixed_precision=precision, **changes)
    measured = measure.count_work(measure.load_models(real, plan.accumulation_steps, CPU), plan)
    assert work == measured
    assert work.pairs == 2 and all(work.flops[part] for part in (ROLLOUT, TRAINING))


def test_random_weights_without_a_finite_score():
    config = small_config()
    plan = plan_batches(config, 1)
    models = measure.load_models(config, plan.accumulation_steps, CPU, random=True)
    models.backbone.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(UserError, match="no score is finite"):
        measure.count_work(models, plan)


def test_rates_are_those_of_prompts_pairs_and_updates_by_hand():
    def turn(rollout, training, ema):
        return Turn({ROLLOUT: rollout, TRAINING: training, EMA: ema}, peak_bytes=None)

    baseline = Measured(
        WORK, (turn((4.0, 6.0, 50.0), (1.0,), (1.0,)), turn((3.0,), (1.0,), (1.0,)))
    )
    # Twice the prompts and four times the pairs at once.
    work = replace(WORK, prompts=4, pairs=40)
    variant = Measured(work, (turn((6.0,), (2.0,), (2.0,)), turn((6.0,), (8.0,), (0.5,))))
    assert variant.ratios(ROLLOUT, baseline) == (2.0, 1.0)  # 2 in 6 s against 4 in 6 s; 2 in 3 s
    assert variant.ratios(TRAINING, baseline) == (2.0, 0.5)
    assert variant.ratios(EMA, baseline) == (0.5, 2.0)
    assert baseline.ratios(ROLLOUT, baseline) == (1.0, 1.0)
    assert baseline.peak_bytes is None
    large = replace(baseline, turns=(Turn({}, 5), Turn({}, 7), Turn({}, 6)))
    assert large.peak_bytes == 7


def test_variants_take_turns_and_one_is_in_memory(monkeypatch):
    order, alive = [], []

    def load(config):
        models = measure.load_models(config, 1, CPU)
        assert not any(unet() for unet in alive)  # the last one's is gone
        alive.append(weakref.ref(models.backbone.unet))
        order.append(config.sample.batch_size)
        return models

    one, two = (small_config(**{"sample.batch_size": n, "sample.num_steps": 3}) for n in (1, 2))
    measured = variants.compare({"one": one, "two": two}, load, rounds=2, repeats=2)
    assert order == [1, 2, 1, 2]
    assert (measured["one"].work.prompts, measured["two"].work.prompts) == (1, 2)
    assert [len(turn.seconds[ROLLOUT]) for turn in measured["two"].turns] == [2, 2]
    rollout = measured["two"].parts()[ROLLOUT]
    assert len(rollout.seconds) == 4 and rollout.flops == measured["two"].work.flops[ROLLOUT]


@pytest.fixture
def parsed(monkeypatch):
    """The flag --config of a script that was called with one change."""
    monkeypatch.setattr(sys, "argv", ["test"])
    define_config("config/sd15.py")
    parse_flags(["test", "--config=config/sdxl.py", "--config.train.beta=3"])
    yield FLAGS["config"].value
    for name in [name for name in FLAGS if name.partition(".")[0] == "config"]:
        delattr(FLAGS, name)


def test_changes_to_a_copy_of_the_config(parsed):
    modules = "lora.target_modules=('to_q','to_k')"
    other = changed(parsed, f"train.max_grad_norm=None,{modules},sample.batch_size=7")
    assert other.lora.target_modules == ("to_q", "to_k")
    assert (other.train.max_grad_norm, other.train.beta, other.sample.batch_size) == (None, 3, 7)
    assert (parsed.train.max_grad_norm, parsed.sample.batch_size) == (1.0, 2)
    assert changed(other, "train.max_grad_norm=2").train.max_grad_norm == 2
    for text, message in {
        "train.beta=x": "config: train.beta=x: expected a number",
        "train.beta=None": "config: train.beta cannot be None",
        "train.bata=1": "unknown key train.bata; did you mean train.beta",
    }.items():
        with pytest.raises(UserError, match=message):
            changed(parsed, text)


def test_a_profile_accounts_for_the_whole_iteration():
    config = small_config(**{"sample.batch_size": 1, "sample.num_steps": 3})
    plan = plan_batches(config, 1)
    text = profile_iteration(measure.load_models(config, plan.accumulation_steps, CPU), plan)
    title, _, _, *rows = text.splitlines()
    assert "aten::mm" in text and len(rows) == 30 + 2
    seconds = [float(row.split()[-2]) for row in rows]
    assert sum(seconds) == pytest.approx(float(title.split()[-2]), rel=0.01)
    assert seconds[:30] == sorted(seconds[:30], reverse=True)


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
        assert 0.1 < figures["peak_memory_gib"] < 10 and figures["images_per_second"] > 0
        row = figures["parts"][TRAINING]
        assert [len(turn) for turn in row["turns"]] == [1, 1] and len(row["ratios"]) == 2
        assert f"  {name} " in result.stdout
    flops = [figures["parts"][TRAINING]["tflop"] for figures in variants.values()]
    assert flops[1] < flops[0]  # a LoRA of less
