"""The official code's traces replay, and a replay of a broken algorithm does not."""

import itertools
import json
import math
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, MODELS
from safetensors.torch import load_file, save_file

from spo.method import learner as learner_module
from spo.method import rollout
from spo.method.build import read_recipe
from spo.method.replay import TOLERANCES, Replay, failures, tolerances
from spo.models.device import speed_up
from spo.preference import replay as lrm_replay
from spo.preference.replay import replay_latent_reward

SCRIPT = Path(__file__).parent.parent / "scripts" / "replay_trace.py"
FOUND = sorted(path.parent.name for path in GOLDEN.glob("*/meta.json"))
FAMILIES = ("sd15", "sdxl")
TRACES = [name for name in FOUND if not name.startswith("lrm_")]
OF_LRM = [name for name in FOUND if name.startswith("lrm_")]
COMPARED = {
    "timesteps",
    "permutation",
    "minibatches",
    "latents",
    "scores",
    "losses",
    "terms",
    "policy",
}
COMPARED_OF = {
    "gradspo": {"directions", "predictions", "ema"},
    "spo": {"next_latents"},
    "lpo": {"next_latents", "token_ids"},
}


def test_all_traces_are_here():
    algorithms = ("gradspo_sd15", "gradspo_sdxl", "spo_sd15", "spo_sdxl", "lpo_sd15", "lpo_sdxl")
    variants = ("gradspo_sd15_clip", "gradspo_sdxl_clip", "spo_sd15_all", "spo_sdxl_all")
    others = ("lpo_sd15_b", "lpo_sd15_all", "lpo_sd15_variance", "lpo_sdxl_all")
    assert set(TRACES) == {*algorithms, *variants, *others}
    assert [
        f"lrm_{what}_{family}" for what in ("forward", "train") for family in FAMILIES
    ] == OF_LRM


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_replays(trace):
    replay = Replay(GOLDEN / trace, MODELS)
    algorithm = replay.config.algorithm
    rollouts = replay.run()
    assert len(rollouts) == len(replay.meta["rollouts"])
    for deviations in rollouts:
        assert set(deviations) == COMPARED | COMPARED_OF[algorithm]
    assert failures(rollouts, tolerances(replay.config)) == []


SEEN = {
    "forward": {"scores", "image_features", "text_features"},
    "train": {"noisy_latents", "unit_features", "loss", "gradients"},
}


@pytest.mark.parametrize("trace", OF_LRM)
def test_a_reward_model_replays(trace):
    report = replay_latent_reward(GOLDEN / trace, MODELS)
    assert report["failures"] == []
    what = trace.split("_")[1]
    cases = ["cfg", "cfg_all", "none"] if what == "forward" else ["batch 0", "batch 1"]
    assert list(report["cases"]) == cases
    assert all(set(deviations) == SEEN[what] for deviations in report["cases"].values())


def noise_shared_by_the_images(own):
    def draw(*arguments):
        drawn = own(*arguments)
        return replace(drawn, noise=drawn.noise[:, :1].expand_as(drawn.noise))

    return draw


@pytest.mark.parametrize(
    ("trace", "changes", "quantity"),
    [
        ("lrm_train_sd15", {"guidance_scale": 1}, "gradients"),
        ("lrm_train_sdxl", {"multi_scale_cfg": True}, "loss"),
        ("lrm_train_sd15", {"logit_scale": 2.66}, "loss"),
        ("lrm_train_sdxl", None, "noisy_latents"),
    ],
)
def test_a_broken_training_of_the_reward_model_does_not_replay(
    trace, changes, quantity, tmp_path, monkeypatch
):
    folder = shutil.copytree(GOLDEN / trace, tmp_path / trace)
    meta = json.loads((folder / "meta.json").read_text())
    if changes is None:
        draw = noise_shared_by_the_images(lrm_replay._draw_noise)
        monkeypatch.setattr(lrm_replay, "_draw_noise", draw)
    meta["batches"] = [batch | (changes or {}) for batch in meta["batches"]]
    (folder / "meta.json").write_text(json.dumps(meta))
    failed = replay_latent_reward(folder, MODELS)["failures"]
    assert sum(f": {quantity} " in failure for failure in failed) == 2, failed


@pytest.mark.slow
@pytest.mark.parametrize(
    "trace", ["gradspo_sd15_clip", "gradspo_sdxl_clip", "lpo_sd15", "lpo_sdxl"]
)
def test_a_trace_replays_with_other_memory_layout_and_recomputed_activations(trace):
    replay = Replay(GOLDEN / trace, MODELS)
    assert replay.learner.merged is not None  # as everywhere, by default
    replay.backbone.unet.enable_gradient_checkpointing()
    layout = replace(replay.recipe.speed, channels_last=True)
    speed_up(replay.backbone, replay.scorer, layout)
    assert not replay.backbone.unet.conv_in.weight.is_contiguous()
    if trace.startswith("lpo"):
        assert not replay.scorer.model.unet.conv_in.weight.is_contiguous()
    assert failures(replay.run(), tolerances(replay.config)) == []


def remove_clips(replay):
    replay.learner.loss = replace(replay.learner.loss, clip_eps=None)


def swap_ema_for_policy(replay):
    """In the loss alone: what the replay compares of the predictions stays right."""
    own_loss = replay.learner.loss

    def loss(predictions, *rest):
        return own_loss(replace(predictions, ema=predictions.policy.detach()), *rest)

    replay.learner.loss = loss


def freeze_ema(replay):
    replay.learner.settings = replace(replay.learner.settings, ema_decay=1.0)


def ignore_accumulation(replay):
    replay.learner.settings = replace(replay.learner.settings, accumulation_steps=1)


def move_ema_with_the_optimizer(replay):
    replay.learner.settings = replace(replay.learner.settings, ema_every="optimizer_step")


def sample_from_the_policy(replay):
    replay.learner.drawing_network = lambda: replay.learner.lora.using(
        replay.learner.lora.snapshot()
    )


def change(**values):
    def break_it(replay):
        for name, value in values.items():
            assert replay.config.sample[name] != value
            replay.config.sample[name] = value
        replay.recipe = read_recipe(replay.config)
        replay.learner.sampler = replay.recipe.load_sampler(replay.backbone)
        replay.learner.loss = replay.recipe.loss

    return break_it


CONSTANT = change(threshold=0.3, threshold_schedule=None, threshold_min=None, threshold_max=None)


def judge(**values):
    """Changes attributes of the latent reward model."""

    def break_it(replay):
        for name, value in values.items():
            assert getattr(replay.scorer.model, name) != value
            setattr(replay.scorer.model, name, value)

    return break_it


def guide_every_stage(replay):
    model = replay.scorer.model

    def guided(stage, conditional, unconditional):
        return unconditional + model.guidance_scale * (conditional - unconditional)

    model._guided = guided


def leave_out_the_last_choice(replay):
    """The candidate that would carry on after the last comparison is not drawn."""
    asked, choose = itertools.count(1), rollout._Walk.choose

    def all_but_the_last(walk, k, b):
        is_last = next(asked) == len(walk.sampler.timesteps)
        return torch.zeros(b, dtype=torch.long) if is_last else choose(walk, k, b)

    replay.patch.setattr(rollout._Walk, "choose", all_but_the_last)


def beta_of_spo(replay):
    replay.learner.loss = replace(replay.learner.loss, beta=10.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trace", "break_it", "rollouts", "quantity"),
    [
        ("gradspo_sd15_clip", remove_clips, 1, "losses"),
        ("gradspo_sdxl_clip", remove_clips, 1, "losses"),
        ("spo_sd15_all", remove_clips, 1, "losses"),
        ("spo_sdxl_all", remove_clips, 1, "losses"),
        ("gradspo_sd15_clip", swap_ema_for_policy, 1, "terms"),
        ("gradspo_sd15_clip", freeze_ema, 1, "predictions"),
        ("gradspo_sd15_clip", sample_from_the_policy, 2, "latents"),
        ("gradspo_sdxl", move_ema_with_the_optimizer, 2, "ema"),
        ("gradspo_sdxl", ignore_accumulation, 1, "policy"),
        ("spo_sdxl", ignore_accumulation, 1, "policy"),
        ("gradspo_sdxl_clip", change(final_direction="window"), 1, "directions"),
        ("gradspo_sd15", change(threshold=0.0), 1, "timesteps"),
        ("gradspo_sd15", change(keep_all_final=False), 1, "timesteps"),
        ("gradspo_sd15_clip", change(final_score_timestep="zero"), 1, "scores"),
        ("gradspo_sdxl_clip", change(final_step="branch"), 1, "timesteps"),
        ("spo_sdxl_all", change(final_step="branch", num_inner_steps=2), 1, "next_latents"),
        ("spo_sd15_all", change(eta=0.9), 1, "next_latents"),
        ("spo_sd15_all", change(guidance_scale=4.9), 1, "next_latents"),
        ("lpo_sd15", judge(guidance_scale=1), 1, "scores"),
        ("lpo_sd15", judge(guidance_scale=5.0), 1, "scores"),
        ("lpo_sd15", judge(guide_stages=True), 1, "scores"),
        ("lpo_sd15_all", judge(guide_stages=False), 1, "scores"),
        ("lpo_sdxl_all", guide_every_stage, 1, "scores"),
        ("lpo_sd15", change(score_timestep="next"), 1, "scores"),
        ("lpo_sdxl", change(score_timestep="next"), 1, "scores"),
        ("lpo_sd15", CONSTANT, 1, "timesteps"),
        ("lpo_sd15", change(threshold_min=0.5, threshold_max=0.35), 1, "timesteps"),
        ("lpo_sd15_variance", change(threshold_schedule="sigma"), 1, "timesteps"),
        ("lpo_sd15_variance", change(stop_at=0), 1, "timesteps"),
        ("lpo_sd15_b", change(branch_from=2), 1, "timesteps"),
        ("lpo_sd15", leave_out_the_last_choice, 1, "permutation"),
        ("lpo_sd15", beta_of_spo, 1, "losses"),
        ("lpo_sd15_all", remove_clips, 1, "losses"),
        ("lpo_sd15_b", ignore_accumulation, 1, "policy"),
    ],
)
def test_a_broken_algorithm_does_not_replay(trace, break_it, rollouts, quantity, monkeypatch):
    replay = Replay(GOLDEN / trace, MODELS)
    replay.patch = monkeypatch
    break_it(replay)
    deviations = [replay.rollout(index) for index in range(rollouts)]
    failed = failures(deviations, tolerances(replay.config))
    assert any(f": {quantity} " in failure for failure in failed), failed


def test_an_ema_that_is_never_updated_does_not_replay(monkeypatch):
    monkeypatch.setattr(learner_module, "update_ema", lambda *args: None)
    replay = Replay(GOLDEN / "gradspo_sd15_clip", MODELS)
    failed = failures([replay.rollout(0)], TOLERANCES)
    assert any(": ema " in failure for failure in failed)


def first_rollout(trace, folder):
    """A copy of a trace that ends after its first rollout."""
    shutil.copytree(GOLDEN / trace, folder)
    path = folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"rollouts": meta["rollouts"][:1]}))
    return folder


def test_a_person_gets_a_table(monkeypatch, capsys):
    report = {
        "trace": "one",
        "rollouts": [{"losses": 1e-6, "ema": 1e-5}, {"losses": None, "ema": 1e-4}],
        "failures": failures([{"losses": 1e-6, "ema": 1e-5}, {"losses": math.inf}], TOLERANCES),
    }
    script = runpy.run_path(str(SCRIPT))
    monkeypatch.setitem(script["main"].__globals__, "replay", lambda *_: report)
    monkeypatch.setattr(sys, "argv", ["replay_trace.py", "--trace=one", "--models=models"])
    assert script["main"]() == 1  # into a pipe
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert script["main"]() == 1
    sys.argv.append("--json")
    assert script["main"]() == 1
    first, *table, failed, last = capsys.readouterr().out.splitlines()
    assert json.loads(first) == json.loads(last) == report
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[0] == ["one", "rollout 0", "rollout 1", ""]
    assert cells[2:] == [
        ["losses", "1.0e-06", "unlike", "FAIL"],
        ["ema", "1.0e-05", "1.0e-04", "pass"],
    ]
    assert failed == "rollout 1: losses inf > 2e-05"


def run_script(trace):
    command = [sys.executable, str(SCRIPT), "--trace", str(trace), "--models", str(MODELS)]
    return subprocess.run(command, capture_output=True, text=True, cwd=trace)


@pytest.mark.slow
def test_the_command_line(tmp_path):
    trace = first_rollout("spo_sdxl", tmp_path / "trace")
    result = run_script(trace)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["failures"] == []
    assert set(report["rollouts"][0]) == COMPARED | COMPARED_OF["spo"]

    tensors = load_file(trace / "trace.safetensors")
    tensors["it0.batch1.loss"] += 1e-4
    save_file(tensors, trace / "trace.safetensors")
    result = run_script(trace)
    assert result.returncode == 1
    (failure,) = json.loads(result.stdout)["failures"]
    assert failure.startswith("rollout 0: losses 1.0e-04 > 2e-05")
