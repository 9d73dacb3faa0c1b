"""Whole runs: what they leave behind, that they repeat, resume, and agree over processes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers import tiny_sd21
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from spo.command_line.config_files import load_config
from spo.errors import RunError, UserError
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import KOHYA_FILE
from spo.method.losses import LOSSES, GradSPO
from spo.method.preflight import preflight
from spo.method.start import train
from tests.small_runs import JUDGED, LPO, judged, run

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tests" / "data" / "golden" / "models"
LORA = "pytorch_lora_weights.safetensors"
TIMING = ("seconds_rollout", "seconds_train", "images_per_second", "peak_memory_gib")
TIMING += ("seconds_evaluation", "seconds_judging")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The tiny config made smaller: four prompts, two rollouts of two in each of two epochs."""
    monkeypatch.chdir(ROOT)
    config = load_config("tests/data/random_models.py")
    config.update_from_flattened_dict(
        {
            "logdir": str(tmp_path),
            "run_name": "run",
            "prompts.num": 4,
            "num_epochs": 2,
            "eval.num_images": 2,
            "eval.num_steps": 4,
            "sample.batch_size": 2,
            "sample.num_steps": 8,
            "sample.branch_from": 2,
            "sample.threshold": 0.0,
            "train.batch_size": 4,
        }
    )
    return config


def read_metrics(run_dir):
    """Lines of metrics.jsonl without what no two runs share."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def image_of(pipe):
    generator = torch.Generator().manual_seed(0)
    result = pipe("a red fox", num_inference_steps=2, generator=generator, output_type="np")
    return torch.as_tensor(result.images)


def launch_tiny(logdir, prompts):
    """Runs the command of the README for one epoch, and returns its run directory and output."""
    command = ["bash", "launch_tiny.sh", f"--config.logdir={logdir}", "--config.run_name=run"]
    command += ["--config.num_epochs=1", f"--config.prompts.num={prompts}"]
    command += ["--config.eval.num_images=2", "--config.tracker.name=tensorboard"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return logdir / "run", result.stdout


@pytest.mark.slow
def test_launch_script_leaves_everything_in_the_run_directory(tmp_path):
    run_dir, output = launch_tiny(tmp_path, prompts=8)
    for name in (LORA, "metrics.jsonl", "tiny_world.png", "curves.png"):
        assert str(run_dir / name) in output and (run_dir / name).is_file()
    for name in ("config.json", f"ema/{LORA}", f"checkpoints/epoch_0001/{LORA}"):
        assert (run_dir / name).is_file()
    assert sorted(p.name for p in (run_dir / "validation").iterdir()) == [
        f"epoch_000{epoch}_policy.{kind}" for epoch in (0, 1) for kind in ("json", "png")
    ]
    assert (run_dir / "best").resolve() == run_dir / "checkpoints" / "epoch_0001"
    assert any("tfevents" in p.name for p in run_dir.rglob("*"))
    line, judged = read_metrics(run_dir)
    assert judged["verdict"] == "healthy" and judged["text"] in output
    assert line["updates"] == line["minibatches"] > 0
    assert sum(line["pairs_at"].values()) == line["pairs"] <= line["comparisons"] == 8 * 16
    for key in ("loss", "win_ratio", "lose_ratio", "grad_norm", "score_spread", "ema_distance"):
        assert line[key] > 0
    judged = json.loads((run_dir / "tiny_world.json").read_text())
    assert judged["num_images"] == 200 and judged["faithful"]["base"] >= 0.9

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "assets" / "tiny" / "sd15")
    before = image_of(pipe)
    pipe.load_lora_weights(run_dir)
    assert (image_of(pipe) - before).abs().max() > 1e-4


@pytest.mark.slow
def test_five_rollouts_of_the_launch_script_make_better_images(tmp_path):
    """The whole method: better by a measure that it never saw, and as faithful."""
    run_dir, _ = launch_tiny(tmp_path, prompts=40)
    *lines, _ = read_metrics(run_dir)  # and a verdict
    assert [line["comparisons"] for line in lines] == [8 * 16] * 5
    judged = json.loads((run_dir / "tiny_world.json").read_text())
    assert judged["difference"]["low"] > 0.1 and judged["win_rate"]["low"] > 0.65
    assert judged["faithful"]["trained"] >= judged["faithful"]["base"] - 0.03


def test_runs_repeat_bit_for_bit_wherever_they_write(config, tmp_path):
    config.num_epochs = 1
    train(config.copy_and_resolve_references())
    again = config.copy_and_resolve_references()
    again.run_name, again.tracker.name, again.eval_interval = "again", "tensorboard", 0
    train(again)
    for name in (LORA, f"ema/{LORA}", f"checkpoints/epoch_0001/{LORA}"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for file in (tmp_path / "run" / LORA, tmp_path / "run" / "ema" / LORA):  # for other programs
        ours, theirs = (read_lora_file(f, "") for f in (file, file.with_name(KOHYA_FILE)))
        assert ours.modules.keys() == theirs.modules.keys()
        assert all(torch.equal(m.up, theirs.modules[n].up) for n, m in ours.modules.items())
    other = config.copy_and_resolve_references()
    other.run_name, other.seed = "other", 43
    train(other)
    assert (tmp_path / "run" / LORA).read_bytes() != (tmp_path / "other" / LORA).read_bytes()


def test_resumed_run_is_the_run_that_was_not_interrupted(config, tmp_path):
    # 6 minibatches an epoch: the checkpoint holds half an accumulated gradient.
    config.train.gradient_accumulation_steps = 4
    train(config.copy_and_resolve_references())
    first = config.copy_and_resolve_references()
    first.run_name, first.num_epochs = "resumed", 1
    train(first)
    rest = config.copy_and_resolve_references()
    rest.run_name, rest.resume_from = "resumed", "auto"
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"rollout": 3, "loss": "of a rollout after the checkpoint"}) + "\n")
        file.write('{"rollout": 4, "lo')  # killed while it wrote
    train(rest)
    whole, resumed = tmp_path / "run", tmp_path / "resumed"
    assert (whole / f"ema/{LORA}").read_bytes() != (whole / LORA).read_bytes()
    for name in ("policy", "ema"):
        file = LORA if name == "policy" else f"ema/{LORA}"
        expected, found = load_file(whole / file), load_file(resumed / file)
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert read_metrics(whole) == read_metrics(resumed)
    assert len(read_metrics(whole)) == 4
    grids = [run / "validation" / "epoch_0002_policy.png" for run in (whole, resumed)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


SMALL = {
    "eval_interval": 0,
    "sample.batch_size": 2,
    "sample.num_steps": 8,
    "sample.branch_from": 2,
    "sample.threshold": 0.0,
    "train.batch_size": 3,
}


def launch(count, **overrides):
    """Train the tiny config in `count` processes on the CPU."""
    command = [sys.executable, "-m", "spo.launch", "--cpu", "train_sd15.py"]
    command += [f"--num_processes={count}", "--config=tests/data/random_models.py"]
    overrides = SMALL | {name.replace("__", "."): value for name, value in overrides.items()}
    command += [f"--config.{key}={value}" for key, value in overrides.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]


def assert_same_lora(one, other):
    """Equal up to rounding; a rate of 1e-3 moves the weights by much more."""
    one, other = load_file(one / LORA), load_file(other / LORA)
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("judge", [None, "lpo_sd15", "gradspo_lrm_sd15"])
def test_two_processes_train_what_one_trains(tmp_path, judge):
    """Slices are seeded by their place, and minibatches of all processes hold the same pairs."""
    sizes = {"sample__global_batch_size": 4, "train__global_batch_size": 6}
    sizes |= JUDGED.get(judge, {}) | {"sample__threshold_min": None, "sample__threshold_max": None}
    sizes |= {"sample__threshold_schedule": None, "sample__threshold": 0.0}  # keeps every pair
    for count in (1, 2):
        # The last rollout has one prompt: a process without any.
        launch(count, logdir=tmp_path, run_name=count, num_epochs=1, prompts__num=5, **sizes)
    assert_same_lora(tmp_path / "1", tmp_path / "2")
    if judge != "lpo_sd15":
        policy, ema = load_file(tmp_path / "1" / LORA), load_file(tmp_path / "1" / "ema" / LORA)
        assert max((policy[key] - ema[key]).abs().max() for key in policy) > 1e-3
    lines = [read_metrics(tmp_path / str(count)) for count in (1, 2)]
    assert [line["pairs"] for line in lines[0]] == [line["pairs"] for line in lines[1]] == [24, 6]
    assert [line["updates"] for line in lines[0]] == [line["updates"] for line in lines[1]]
    for one, two in zip(*lines, strict=True):
        assert one["kl_at"].keys() == {t for t, n in one["pairs_at"].items() if n}
        assert two["kl_at"] == pytest.approx(one["kl_at"], rel=0.02)
        assert two["lora_norm"] == pytest.approx(one["lora_norm"], rel=1e-3)
    (start,) = (tmp_path / "2" / "starts.jsonl").read_text().splitlines()
    assert json.loads(start)["plan"]["num_processes"] == 2
    assert json.loads(start)["prompt_lengths"].startswith("none of 5 prompts is longer than the 77")


@pytest.mark.slow
def test_two_processes_resume_in_the_middle_of_an_accumulated_gradient(tmp_path):
    # 4 minibatches on each process in an epoch, 3 to an update.
    common = {"logdir": tmp_path, "prompts__num": 4, "train__gradient_accumulation_steps": 3}
    launch(2, run_name="whole", num_epochs=2, **common)
    launch(2, run_name="resumed", num_epochs=1, **common)
    launch(2, run_name="resumed", num_epochs=2, resume_from="auto", **common)
    assert_same_lora(tmp_path / "whole", tmp_path / "resumed")
    updates = [line["updates"] for line in read_metrics(tmp_path / "resumed")]
    assert updates == [line["updates"] for line in read_metrics(tmp_path / "whole")] == [1, 1]


@pytest.mark.parametrize("algorithm", ["gradspo", "spo"])
def test_sdxl_trains_through_the_same_code(config, tmp_path, algorithm):
    config.update_from_flattened_dict(
        {
            "algorithm": algorithm,
            "family": "sdxl",
            "pretrained.model": str(MODELS / "tiny-sdxl"),
            "num_epochs": 1,
            "sample.num_inner_steps": 2 if algorithm == "spo" else 0,
            "lora.rank": 2,
            "lora.alpha": 4,
        }
    )
    train(config)
    pipe = StableDiffusionXLPipeline.from_pretrained(MODELS / "tiny-sdxl")
    before = image_of(pipe)
    pipe.load_lora_weights(tmp_path / "run")
    assert (image_of(pipe) - before).abs().max() > 1e-4


@pytest.mark.parametrize("judge", JUDGED)
def test_judged_in_latent_space_without_a_vae(tmp_path, monkeypatch, judge):
    """Its weights are read for validation images alone."""
    monkeypatch.chdir(ROOT)
    changes = JUDGED[judge] | {"num_epochs": 1, "sample.branch_from": 0}
    model = shutil.copytree(MODELS / f"tiny-{judge[-4:]}", tmp_path / "base")
    own = changes | {"pretrained.model": str(model)}
    drawn = run(tmp_path / "drawn", **own)
    assert len(list((drawn / "validation").glob("*.png"))) == 2
    next((model / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="pretrained: .*vae: no weights"):
        run(tmp_path / "refused", **own)
    blind = run(tmp_path / "blind", **own, eval_interval=0)
    assert not list(blind.glob("validation/*"))
    assert (blind / LORA).read_bytes() == (drawn / LORA).read_bytes()
    # Four comparisons of each of four prompts, at every timestep that their candidates were drawn at.
    lines = read_metrics(blind)
    assert sum(line["comparisons"] for line in lines) == 4 * 4
    assert set(lines[0]["pairs_at"]) <= {"751", "501", "251", "1"} and lines[0]["updates"] > 0
    pipeline = StableDiffusionXLPipeline if judge.endswith("xl") else StableDiffusionPipeline
    pipe = pipeline.from_pretrained(MODELS / f"tiny-{judge[-4:]}")
    before = image_of(pipe)
    pipe.load_lora_weights(blind)
    assert (image_of(pipe) - before).abs().max() > 1e-4


def test_sd21_trains_with_the_reward_model_of_sd15(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = str(tiny_sd21(tmp_path / "sd21"))
    folder = run(tmp_path / "run", **JUDGED["lpo_sd15"] | {"pretrained.model": model})
    assert read_metrics(folder)[-1]["updates"] > 0
    pipe = StableDiffusionPipeline.from_pretrained(model)
    before = image_of(pipe)
    pipe.load_lora_weights(folder)
    after = image_of(pipe)
    assert (after - before).abs().max() > 1e-4
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder, weight_name=KOHYA_FILE)  # the same, as other programs name it
    torch.testing.assert_close(image_of(pipe), after)
    with safe_open(folder / KOHYA_FILE, framework="pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v2"
    assert "modelspec.architecture" not in header


def test_scores_of_latents_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    judge = shutil.copytree(MODELS / "tiny-lrm-sd15", tmp_path / "lrm")
    saved = torch.load(judge / "state_dict.pt", weights_only=True)
    torch.save(saved | {"logit_scale": 100.0}, judge / "state_dict.pt")  # whose exp overflows fp32
    changes = judged("sd15", **LPO)
    changes["preference.kwargs"] = changes["preference.kwargs"] | {"checkpoint": str(judge)}
    with pytest.raises(RunError, match=r"scores are not finite at t = 251 for the prompts '"):
        run(tmp_path / "run", **changes)


def test_warm_start_begins_and_compares_with_the_given_lora(config, tmp_path):
    config.num_epochs = 1
    train(config.copy_and_resolve_references())
    warm = config.copy_and_resolve_references()
    warm.run_name, warm.lora.init_from, warm.lora.reference = "warm", str(tmp_path / "run"), "init"
    warm.train.learning_rate = 1e-12
    train(warm)
    start, end = load_file(tmp_path / "run" / LORA), load_file(tmp_path / "warm" / LORA)
    for key in start:
        torch.testing.assert_close(start[key], end[key], atol=1e-7, rtol=0)
    # Policy and reference are the same network: ratio 1 at every pair.
    assert all(
        line["win_ratio"] == pytest.approx(1, abs=1e-6) for line in read_metrics(tmp_path / "warm")
    )
    cold = Image.open(tmp_path / "run/validation/epoch_0000_policy.png")
    first = Image.open(tmp_path / "warm/validation/epoch_0000_policy.png")
    assert cold.tobytes() != first.tobytes()


@pytest.mark.parametrize(
    ("algorithm", "sign"),
    [
        ("gradspo", 1),
        pytest.param("gradspo", -1, marks=pytest.mark.slow),
        pytest.param("spo", 1, marks=pytest.mark.slow),
    ],
)
def test_training_raises_what_the_scorer_measures(config, tmp_path, algorithm, sign):
    """The whole method on a scorer that can be read off the image: brightness, or darkness."""
    config.update_from_flattened_dict(
        {
            "preference.scorer": "tests.scorers_for_tests:brightness",
            "num_epochs": 7,
            "prompts.num": 8,
            "eval_interval": 0,
            "save_interval": 7,
            "sample.batch_size": 8,
            "train.batch_size": 16,
        }
    )

    def last_brightness(name, algorithm, sign, learning_rate):
        run = config.copy_and_resolve_references()
        run.run_name, run.algorithm, run.train.learning_rate = name, algorithm, learning_rate
        with run.unlocked():
            run.preference.kwargs = {"sign": sign}
        train(run)
        return sign * read_metrics(tmp_path / name)[-1]["score_mean"]

    # The same prompts and noise, and a LoRA that stays where it is.
    untrained = last_brightness("untrained", "gradspo", 1, 1e-12)
    trained = last_brightness("trained", algorithm, sign, 3e-3)
    assert sign * (trained - untrained) > 0.5


def test_a_score_that_is_not_finite_stops_the_run_and_names_step_and_prompt(config, tmp_path):
    config.preference.scorer = "tests.scorers_for_tests:brightness"
    prompts = preflight(config, 1).prompts.prompts
    # One epoch is 2 rollouts of 6 comparisons, decoded in one slice each.
    with config.unlocked():
        config.preference.kwargs = {"bad_prompt": prompts[0], "good_calls": 12}
    with pytest.raises(RunError, match=r"not finite at t = \d+") as caught:
        train(config)
    assert prompts[0] in str(caught.value)
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch_0001" / LORA
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint).values())


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_prompts(config, monkeypatch):
    class Broken(GradSPO):
        def __call__(self, *arguments):
            output = super().__call__(*arguments)
            return replace(output, loss=output.loss * torch.nan)

    monkeypatch.setitem(LOSSES, "gradspo", Broken)
    with pytest.raises(RunError, match=r"the loss is not finite at t = \[.* rollout 1, "):
        train(config)
