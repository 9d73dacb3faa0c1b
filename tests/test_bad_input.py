"""Bad input: one line that names the key or file, before any model is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from config import tiny
from spo.errors import UserError
from spo.method.preflight import preflight
from spo.run.checkpoint_folder import new_checkpoint, write_state
from spo.run.session import open_run_dir

ROOT = Path(__file__).resolve().parent.parent
MODELS = "tests/data/golden/models"
STATE = {"position": {"epochs": 1, "prompts": 0}, "rollout": None, "accumulated": 0}

CASES = {
    "missing checkpoint": ({"preference.checkpoint": "no.bin"}, "preference.checkpoint: .*no.bin"),
    "missing prompts": ({"prompts.source": "no.txt"}, "prompts.source: no file no.txt"),
    "prompts without captions": ({"prompts.source": "PROMPTS.json"}, "no column 'caption'"),
    "missing eval prompts": ({"eval.prompts": "no.txt"}, "eval.prompts: no file no.txt"),
    "too many inner steps": (
        {"algorithm": "spo", "sample.num_inner_steps": 16},
        "sample.num_inner_steps: 16 is not from 0 to 15",
    ),
    "inner steps": ({"sample.num_inner_steps": 1}, "sample.num_inner_steps: gradspo"),
    "eta 0": ({"sample.eta": 0.0}, "sample.eta: 0.0 must be above 0"),
    "branch at the end": ({"sample.branch_from": 20}, "sample.branch_from: 20 is outside"),
    "branch at the last step": (
        {"sample.branch_from": 19, "sample.final_step": "extend"},
        "sample.branch_from: 19 is outside",
    ),
    "branch before": ({"sample.branch_from": -1}, "sample.branch_from: -1 is outside"),
    "one candidate": ({"sample.num_candidates": 1}, "sample.num_candidates: 1 candidates"),
    "no steps": ({"sample.num_steps": 0}, "sample.num_steps: 0 must be"),
    "too many steps": ({"sample.num_steps": 1001}, "sample.num_steps"),
    "negative rate": ({"train.learning_rate": -1e-4}, "train.learning_rate: -0.0001 must be above"),
    "rate not a number": ({"train.learning_rate": float("nan")}, "train.learning_rate: nan"),
    "infinite beta": ({"train.beta": float("inf")}, "train.beta: inf"),
    "clip of one": ({"train.clip_eps": 1.0}, "train.clip_eps: 1.0 must be above 0 and below 1"),
    "clips without the EMA's prediction": (
        {"train.ema_prediction": "none"},
        "train.ema_prediction: without the EMA's prediction the clips cannot be computed",
    ),
    "EMA above one": ({"train.ema_decay": 1.1}, "train.ema_decay: 1.1 must be from 0 to 1"),
    "rank 0": ({"lora.rank": 0}, "lora.rank: 0 must be a whole number from 1"),
    "SDXL config, SD1.5 model": ({"family": "sdxl"}, "family='sdxl' needs a StableDiffusionXLPipe"),
    "SD1.5 config, SDXL model": (
        {"pretrained.model": f"{MODELS}/tiny-sdxl"},
        "StableDiffusionXLPipeline, but family='sd15'",
    ),
    "no model there": ({"pretrained.model": "./no"}, "pretrained.model: './no' is neither"),
    "folder without a model": ({"pretrained.model": "assets"}, "pretrained.model: no file"),
    "no decoder there": ({"sample.decoder": "./no"}, "sample.decoder: './no' is neither"),
    "folder without a decoder": ({"sample.decoder": "assets"}, "sample.decoder: no file"),
    "VAE as the decoder": (
        {"sample.decoder": "assets/tiny/sd15/vae"},
        "sample.decoder: .*vae/config.json is that of a AutoencoderKL, not of an AutoencoderTiny",
    ),
    "decoder of other latents": (
        {"sample.decoder": "assets/architectures/taesd"},
        "sample.decoder: .*taesd' decodes latents of 4 channels, but those of the base model have 8",
    ),
    "unknown family": ({"family": "sd3"}, "family: 'sd3' is none of sd15, sdxl"),
    "unknown algorithm": ({"algorithm": "dpo"}, "algorithm: 'dpo' is none of gradspo, spo"),
    "loss that can't be imported": ({"algorithm": "no.module:x"}, "algorithm: cannot import"),
    "unknown scorer": ({"preference.scorer": "clip"}, "preference.scorer: 'clip' is none of"),
    "unknown precision": ({"mixed_precision": "fp8"}, "mixed_precision: 'fp8' is none of"),
    "unknown choice": ({"sample.final_step": "stop"}, "sample.final_step: 'stop' is none of"),
    "EMA of SPO": ({"algorithm": "spo", "eval.weights": "ema"}, "eval.weights: spo has no EMA"),
    "unknown tracker": ({"tracker.name": "paper"}, "tracker.name: 'paper' is none of"),
    "reference without LoRA": ({"lora.reference": "init"}, "lora.reference: 'init' needs"),
    "pushed EMA of SPO": (
        {"algorithm": "spo", "hub.weights": "ema"},
        "hub.weights: spo has no EMA",
    ),
    "pushed weights": ({"hub.weights": "best"}, "hub.weights: 'best' is none of policy, ema"),
    "pushed every -1": ({"hub.push_every": -1}, "hub.push_every: -1 must be 0 or more"),
    "repo without a user": ({"hub.repo_id": "name"}, "hub.repo_id: 'name' must be user/name"),
    "missing LoRA": ({"lora.init_from": "./no.safetensors"}, "lora.init_from: no file"),
    "checkpoints among rollouts": (
        {"save_every_rollouts": -1},
        "save_every_rollouts: -1 must be 0 or more",
    ),
    "missing resume": ({"resume_from": "nowhere"}, "resume_from: nowhere is not a checkpoint"),
    "resume of no run": ({"resume_from": "auto"}, "resume_from: auto .* run_name"),
    "loss that is no class": (
        {"algorithm": "spo.method.losses:LOSSES"},
        "algorithm: spo.method.losses:LOSSES is not a class of losses",
    ),
    "parameter that the loss lacks": (
        {"train.loss_kwargs": {"margin": 1.0}},
        "train.loss_kwargs: the parameters of gradspo are beta, clip_eps, grad_scale; .*'margin'",
    ),
    "unknown timesteps": ({"sample.timesteps": "middle"}, "sample.timesteps: 'middle' is none of"),
    "unknown pairing": ({"sample.pairing": "best"}, "sample.pairing: 'best' is none of best_worst"),
    "threshold of two": (
        {"sample.threshold": 2.0},
        "sample.threshold: 2.0 must be from 0 to 1, or",
    ),
    "no LoRA targets": ({"lora.target_modules": ()}, "lora.target_modules: name at least one"),
    "no processor": ({"preference.processor": "assets"}, "preference.processor: no file"),
    "accumulation set twice": (
        {"train.global_batch_size": 16, "train.gradient_accumulation_steps": 2},
        "train.gradient_accumulation_steps: it follows from",
    ),
    "unwritable run directory": ({"logdir": "README.md"}, "logdir: cannot write to README.md"),
    "uneven batches": (
        {"train.global_batch_size": 7, "sample.global_batch_size": 8, "num_processes": 2},
        "train.global_batch_size",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_before_any_model_loads(name, tmp_path, monkeypatch):
    changes, message = dict(CASES[name][0]), CASES[name][1]
    monkeypatch.chdir(ROOT)
    config = tiny.get_config()
    config.logdir = str(tmp_path / "runs")
    num_processes = changes.pop("num_processes", 1)
    if changes.get("prompts.source") == "PROMPTS.json":
        changes["prompts.source"] = str(tmp_path / "prompts.json")
        (tmp_path / "prompts.json").write_text('[{"text": "a fox"}]')
    with config.unlocked():  # train.loss_kwargs takes any name
        config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        ready = preflight(config, num_processes)
        with open_run_dir(ready.run_dir, ready.recipe.config, ready.resume):
            pass
    assert not (tmp_path / "runs").exists()


def test_what_a_run_computed_is_not_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = tiny.get_config()
    config.logdir, config.run_name = str(tmp_path), "run"
    ready = preflight(config, 1)
    run_dir = ready.run_dir
    with open_run_dir(run_dir, ready.recipe.config, ready.resume):
        preflight(config, 1)  # nothing was computed yet
    for epoch in (1, 2):
        with new_checkpoint(run_dir, f"epoch_{epoch:04d}", limit=0) as folder:
            write_state(folder, STATE | ready.facts())
    with pytest.raises(UserError, match="already holds a run"):
        preflight(config, 1)
    config.resume_from = "auto"
    assert preflight(config, 1).resume.checkpoint == run_dir / "checkpoints" / "epoch_0002"
    config.resume_from = str(run_dir / "checkpoints" / "epoch_0001")
    with pytest.raises(UserError, match="choose another run_name to branch off"):
        preflight(config, 1)
    config.run_name = "branch"
    assert preflight(config, 1).resume.checkpoint == run_dir / "checkpoints" / "epoch_0001"


@pytest.mark.slow
def test_the_command_line_says_it_in_one_line_with_status_2(tmp_path):
    command = [
        sys.executable,
        "train_sd15.py",
        "--config=tests/data/random_models.py",
        "--config.lora.rank=0",
    ]
    result = subprocess.run(
        [*command, f"--config.logdir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: lora.rank: 0 must be")
    assert "Traceback" not in result.stderr
