"""Judges of the same rollouts: their agreement by hand, and that the rollouts are training's."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_decoder
from small_runs import SIZES, read_metrics, run, small_config
from test_benchmark import LATENT_REWARD as OF_FAMILY

from spo.costs.pair_agreement import (
    Judged,
    agreement,
    check_judges,
    concatenate,
    judge_rollout,
    load_judges,
)
from spo.errors import UserError
from spo.launch.batch_plan import plan_batches
from spo.method.build import read_recipe
from spo.method.collect import first_slices

ROOT = Path(__file__).resolve().parent.parent
LATENT_REWARD = {key.replace(".", "__"): value for key, value in OF_FAMILY["sd15"].items()}

FALLING = {  # 0.02 at t = 1, and 0.015 at t = 251
    "sample__threshold": None,
    "sample__threshold_schedule": "linear",
    "sample__threshold_min": 0.02,
    "sample__threshold_max": 0.0,
}


def judged(scores, kept):
    scores = torch.tensor(scores)
    chosen = torch.stack([scores.argmax(dim=1), scores.argmin(dim=1)], dim=1)
    return Judged(scores, chosen, torch.tensor(kept))


def test_agreement_by_hand():
    one = judged([[1.0, 2.0, 3.0], [6.0, 4.0, 5.0], [0.0, 1.0, 2.0]], [True, False, True])
    # The same but for a constant; only the same best; only the same worst.
    other = judged([[11.0, 12.0, 13.0], [6.0, 5.0, 4.0], [0.0, 2.0, 1.0]], [True, True, False])
    found = agreement(one, other)
    assert found["comparisons"] == 3
    assert (found["best"], found["worst"]) == (2 / 3, 2 / 3)
    assert (found["both"], found["both_of_pairs"]) == (1 / 3, 1 / 2)
    assert found["kept"] == 1 / 3
    assert found["correlation"] == pytest.approx((2 + 1 + 1) / 6)
    none = judged(one.scores.tolist(), [False] * 3)
    assert math.isnan(agreement(none, other)["both_of_pairs"])


def test_comparisons_are_joined_in_order():
    one, other = judged([[0.0, 1.0], [2.0, 0.0]], [True, False]), judged([[0.0, 3.0]], [False])
    found = concatenate([one, other])
    assert found.scores.tolist() == [[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]
    assert found.chosen.tolist() == [[1, 0], [0, 1], [1, 0]]
    assert found.kept.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample.eta": 0.5}, "--compare: sample.eta changes the rollout itself"),
        ({"sample.threshold": 0.1, "seed": 5}, "--compare: seed changes the rollout itself"),
        ({"sample.decoder": "./no"}, "sample.decoder: './no' is neither"),
        ({"preference.dtype": "int8"}, "preference.dtype: 'int8' is none of"),
        ({"sample.threshold": 2.0}, "sample.threshold: 2.0 must be"),
    ],
)
def test_what_cannot_be_compared(tmp_path, changes, message):
    recipe, other = read_recipe(small_config(tmp_path / "run")), small_config(tmp_path / "run")
    check_judges([recipe, read_recipe(other)])
    other.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check_judges([recipe, read_recipe(other)])


def test_judges_share_what_is_the_same(tmp_path):
    folder = save_tiny_decoder(tmp_path / "decoder")
    config = small_config(tmp_path / "run", sample__decoder=folder)
    exact = small_config(tmp_path / "run", sample__threshold=0.3)
    other = small_config(tmp_path / "run", sample__decoder=folder, preference__dtype="bfloat16")
    recipes = [read_recipe(each) for each in (config, exact, other)]
    model = recipes[0].load_backbone(torch.device("cpu"))
    own, vae, low = load_judges(model, recipes)
    assert own.decoder is low.decoder is model.decoder and vae.decoder is model.vae
    assert own.scorer is vae.scorer is not low.scorer
    assert own.settings.pairs.threshold != vae.settings.pairs.threshold == 0.3


def run_script(*arguments):
    command = [sys.executable, "scripts/pair_agreement.py", "--config=tests/data/random_models.py"]
    command += [f"--config.{k}={v}" for k, v in SIZES.items() if k != "algorithm"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "judge",
    [
        {"sample__threshold": 0.02},
        LATENT_REWARD | FALLING | {"sample__score_timestep": "next"},
    ],
)
def test_the_rollouts_are_those_of_training(tmp_path, judge):
    config = small_config(tmp_path / "run", num_epochs=1, eval_interval=0, **judge)
    recipe, plan = read_recipe(config).drawing_images(), plan_batches(config, 1)
    model, prompts = recipe.load_backbone(torch.device("cpu")), recipe.read_prompts().prompts
    slices = first_slices(len(prompts), plan, config.seed, rollouts=5)
    assert len(slices) == 2 and len({i for part in slices for i in part.prompt_ids}) == 4
    steps = judge_rollout(
        model,
        recipe,
        load_judges(model, [recipe]),
        [prompts[i] for i in slices[0].prompt_ids],
        slices[0].generator,
    )
    judged = concatenate([verdict for _, (verdict,) in steps])
    run(tmp_path / "run", num_epochs=1, eval_interval=0, **judge)
    (first, _) = read_metrics(tmp_path / "run")
    assert judged.scores.mean().item() == pytest.approx(first["score_mean"], abs=1e-5)
    assert judged.scores.std(dim=1).mean().item() == pytest.approx(first["score_spread"], rel=1e-4)
    assert judged.kept.sum() == first["pairs"] == 3 and len(judged.kept) == first["comparisons"]


def test_judges_of_images_and_of_latents_judge_the_same_candidates(tmp_path):
    found = {}
    for config, other in (("models", "lrm"), ("lrm", "models")):
        file = tmp_path / f"{config}.json"
        result = run_script(
            f"--config=tests/data/random_{config}.py",
            "--config.eval_interval=0",
            f"--compare=tests/data/random_{other}.py",
            f"--json={file}",
        )
        assert result.returncode == 0, result.stderr[-2000:]
        found[config] = json.loads(file.read_text())
    one, other = (
        found["models"]["tests/data/random_lrm.py"],
        found["lrm"]["tests/data/random_models.py"],
    )
    assert set(one) == {"all", "t = 251", "t = 1"}
    for key in one:
        symmetric = ("comparisons", "best", "worst", "both", "kept", "correlation")
        assert [one[key][k] for k in symmetric] == pytest.approx([other[key][k] for k in symmetric])
    assert abs(one["all"]["correlation"]) < 0.99


def test_the_script_compares_with_the_config(tmp_path):
    folder, file = save_tiny_decoder(tmp_path / "decoder"), tmp_path / "agreement.json"
    compare = ("sample.threshold=0.02", f"sample.decoder={folder}", "sample.decode_batch_size=3")
    result = run_script(
        *(f"--compare={change}" for change in compare), "--rollouts=1", f"--json={file}"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    figures = json.loads(file.read_text())
    same = figures["sample.decode_batch_size=3"]["all"]
    assert same["both"] == same["kept"] == 1 and same["correlation"] == pytest.approx(1)
    tiny = figures[f"sample.decoder={folder}"]
    assert tiny["all"]["comparisons"] == 4 and tiny["all"]["correlation"] < 0.99
    assert set(tiny) == {"all", "t = 251", "t = 1"}
    assert tiny["t = 1"]["comparisons"] == 2
    # The config's own threshold is 0 and keeps all four.
    assert figures["sample.threshold=0.02"]["all"]["kept"] == 3 / 4
    assert re.search(r"^\| all +\| 4 +\| 1 +\| ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--compare: name a change, e.g. --compare=sample.decoder=madebyollin/taesd."),
        (["--compare=sample.decoder"], "config: 'sample.decoder' is not of the form KEY=VALUE"),
        (["--compare=sample.thresh=1"], "config: unknown key sample.thresh"),
        (["--compare=sample.threshold=x"], "config: sample.threshold=x: expected float"),
        (["--compare=sample.threshold=None"], "sample.threshold_schedule: without one"),
        (["--compare=sample.decoder=None", "--rollouts=0"], "--rollouts: 0 must be 1 or more."),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = run_script(*arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in result.stderr
