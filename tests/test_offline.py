"""Hub ids from the local cache alone: what prefetch leaves behind is enough."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import add_tiny_lora, load_backbone, random_weights, save_tiny_decoder

from spo.evaluation.results import read_results
from spo.lora_io.write import save_lora

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests" / "data" / "golden" / "models"
OVERRIDES = {
    "pretrained.model": "user/tiny-sd15",
    "pretrained.vae": "user/tiny-vae",
    "preference.checkpoint": "hf://user/spm/tiny-spm.bin",
    "preference.backbone": "user/tiny-clip",
    "preference.processor": "user/tiny-clip",
    "sample.decoder": "user/tiny-decoder",
}


@pytest.fixture
def cache(tmp_path):
    """A Hub cache, laid out as huggingface_hub does, that holds the tiny models."""
    sources = {
        "tiny-sd15": MODELS / "tiny-sd15",
        "tiny-vae": MODELS / "tiny-sd15" / "vae",
        "tiny-clip": MODELS / "tiny-clip",
        "tiny-decoder": Path(save_tiny_decoder(tmp_path / "decoder")),
        "spm": MODELS / "tiny-spm.bin",
    }
    for name, source in sources.items():
        repo = tmp_path / "hub" / f"models--user--{name}"
        snapshot = repo / "snapshots" / ("0" * 40)
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        if source.is_dir():
            shutil.copytree(source, snapshot)
        else:
            snapshot.mkdir(parents=True)
            shutil.copy(source, snapshot)
    return tmp_path


def run(script, cache, *arguments):
    command = [sys.executable, script, "--config=tests/data/random_models.py", *arguments]
    command += [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_run_needs_no_network_once_everything_is_cached(cache):
    checked = run("scripts/prefetch.py", cache)
    assert checked.returncode == 0, checked.stderr
    assert "decoder: user/tiny-decoder" in checked.stdout
    assert "Everything is there." in checked.stdout
    small = ["--config.num_epochs=1", "--config.prompts.num=1", "--config.eval_interval=0"]
    trained = run("train_sd15.py", cache, f"--config.logdir={cache}", *small)
    assert trained.returncode == 0, trained.stderr


def test_what_is_missing_is_one_line_with_repo_file_and_command(cache):
    (next((cache / "hub").glob("*spm/snapshots/*")) / "tiny-spm.bin").unlink()
    result = run("train_sd15.py", cache, f"--config.logdir={cache}")
    assert result.returncode == 2
    message = result.stderr.splitlines()[-1]
    assert message.startswith("error: preference.checkpoint: tiny-spm.bin of user/spm: not in")
    assert "HF_HUB_OFFLINE is set" in message
    assert message.endswith("python scripts/prefetch.py --config=...")


@pytest.mark.parametrize(
    ("script", "file", "message"),
    [
        (
            "train_sd15.py",
            "config.json",
            "config.json of user/tiny-decoder: not in the local cache",
        ),
        (
            "scripts/prefetch.py",
            "diffusion_pytorch_model.safetensors",
            "'user/tiny-decoder' cannot be loaded",
        ),
    ],
)
def test_a_decoder_that_is_missing_is_one_line(cache, script, file, message):
    (next((cache / "hub").glob("*tiny-decoder/snapshots/*")) / file).unlink()
    result = run(script, cache, f"--config.logdir={cache}")
    assert result.returncode == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"error: sample.decoder: {message}")
    assert line.endswith("python scripts/prefetch.py --config=...")


def test_an_evaluation_takes_loras_and_models_from_the_cache(cache):
    lora = add_tiny_lora(load_backbone("sd15"))
    snapshot = cache / "hub" / "models--user--loras" / "snapshots" / ("0" * 40)
    (snapshot / "sd1_5").mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    save_lora(snapshot / "sd1_5" / "any_name.safetensors", lora, random_weights(lora, 1), {})
    (cache / "prompts.txt").write_text("a fox\na whale\n")
    command = [sys.executable, "scripts/evaluate.py", "--config=config/eval_base.py"]
    for model in ("base", "lora=user/loras/sd1_5", "full=user/tiny-sd15"):
        command.append(f"--config.models={model}")
    command += ["--config.pretrained.model=user/tiny-sd15", "--config.mixed_precision=no"]
    command += [f"--config.prompts.source={cache / 'prompts.txt'}", "--config.sample.num_steps=2"]
    command += [f"--config.logdir={cache}", "--config.run_name=evaluation"]
    command += ["--config.scorers=scorers_for_tests:image_brightness"]
    environment = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": "tests"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = read_results(cache / "evaluation")
    base, lora, full = (results.scores(m, results.scorers[0]) for m in results.models)
    assert base == full != lora
