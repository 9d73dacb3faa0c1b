"""scripts/sample.py: the images, what they say of themselves, the grid, and bad input."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import MODELS, add_tiny_lora, load_backbone, model_folder, random_weights
from PIL import Image

from spo.errors import UserError
from spo.evaluation import images_cli
from spo.lora_io.write import save_lora
from spo.models.backbone import SCHEDULERS
from spo.models.families import FAMILIES
from spo.models.plain_images import ImageSettings, sample_images
from spo.scorers.pixels import to_pil

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a fox reading a map", "ein Fuchs 🦊"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    backbone = load_backbone("sd15")
    lora = add_tiny_lora(backbone)
    path = tmp_path_factory.mktemp("lora") / "fox.safetensors"
    save_lora(path, lora, random_weights(lora, 1), {"base_model": model_folder("sd15")})
    return path


def settings(**changes):
    values = {
        "seeds": (3,),
        "scheduler": "ddim",
        "num_steps": 2,
        "guidance_scale": 2.0,
        "size": None,
        "mixed_precision": None,
        "batch_size": 1,
    }
    return images_cli.SampleSettings(**(values | changes))


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_ddim_draws_what_the_evaluation_draws_from_the_same_seed(family, tmp_path):
    ours = ImageSettings(num_steps=2, guidance_scale=2.0, seed=5)
    seed = ours.image_seed(0)
    models = images_cli.read_models(["base"], model_folder(family), None, None)
    images_cli.draw_samples(models, PROMPTS[:1], settings(seeds=(seed,)), tmp_path)
    expected = to_pil(sample_images(load_backbone(family), PROMPTS[:1], [0], ours))[0]
    with Image.open(tmp_path / "base" / f"00000_seed{seed}.png") as found:
        assert abs(pixels(found) - pixels(expected)).max() <= 1
        assert pixels(found).std() > 1


def test_strengths_seeds_and_what_an_image_says(lora, tmp_path):
    models = images_cli.read_models(["base", f"fox={lora}:2"], model_folder("sd15"), None, (0, 0.5))
    assert [spec.name for spec in models] == ["base", "fox_0", "fox_0.5"]
    grid = images_cli.draw_samples(models, PROMPTS, settings(seeds=(0, 1)), tmp_path)
    images = {
        path.relative_to(tmp_path).as_posix(): Image.open(path) for path in tmp_path.glob("*/*.png")
    }
    assert len(images) == 3 * 2 * 2
    base, off, half = (images[f"{name}/00001_seed1.png"] for name in ("base", "fox_0", "fox_0.5"))
    assert abs(pixels(base) - pixels(off)).max() <= 1
    assert abs(pixels(base) - pixels(half)).max() > 5
    assert half.text["prompt"] == PROMPTS[1] and half.text["seed"] == "1"
    assert half.text["loras"] == "fox.safetensors:1" and half.text["base"] == "tiny-sd15"
    assert half.text["model"] == "fox=fox.safetensors:2"  # whoever sees the image learns no folder
    assert (half.text["scheduler"], half.text["steps"], half.text["guidance"]) == ("ddim", "2", "2")
    with Image.open(grid) as sheet:  # three columns, four rows
        assert sheet.width > 3 * 256 and sheet.height > 4 * 256


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_repeats_whatever_is_drawn_beside(scheduler, tmp_path):
    models = images_cli.read_models(["base"], model_folder("sd15"), None, None)
    one, two = (settings(scheduler=scheduler, batch_size=size, size=(128, 64)) for size in (1, 2))
    images_cli.draw_samples(models, PROMPTS, one, tmp_path / "one")
    images_cli.draw_samples(models, PROMPTS, two, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one" / "base").iterdir())
    assert names == ["00000_seed3.png", "00001_seed3.png"]
    for name in names:
        alone, beside = (Image.open(tmp_path / part / "base" / name) for part in ("one", "two"))
        assert alone.size == (128, 64)
        assert abs(pixels(alone) - pixels(beside)).max() <= 2


def test_the_base_is_what_the_run_of_the_lora_was_trained_on(lora, tmp_path):
    assert images_cli.default_base(["base", "user/repo"]) == FAMILIES["sd15"].base_model
    assert images_cli.default_base([str(lora)]) == FAMILIES["sd15"].base_model
    (tmp_path / "ema").mkdir()
    (tmp_path / "config.json").write_text('{"pretrained": {"model": "of/the-run"}}')
    (tmp_path / "a+b=c").mkdir()
    for text in (f"fox={tmp_path}:0.5", str(tmp_path / "ema"), f"{tmp_path}/a+b=c:2+user/repo"):
        assert images_cli.default_base(["base", text]) == "of/the-run"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts"], "expected at least one argument"),
        ([], "--prompts: there is none"),
        (["--prompts", "x", "--scheduler", "magic"], "--scheduler: 'magic' is none of ddim"),
        (
            ["--prompts", "x", "--size", "100x64"],
            "--size: 100x64 is not WIDTHxHEIGHT in multiples of 8",
        ),
        (["--prompts", "x", "--size", "wide"], "--size: invalid pixels value: 'wide'"),
        (["--prompts", "x", "--lora_scale", "all"], "--lora_scale: invalid numbers value: 'all'"),
        (["--prompts", "x", "--steps", "0"], "--steps: 0 must be a whole number from 1"),
        (["--prompts", "x", "--lora_scale", "1"], "--lora_scale: there is no LoRA"),
        (["--prompts", "x", "--models", "./no"], "--models: no file './no'"),
        (["--prompts", "x", "--base", "nowhere"], "--base: 'nowhere' is neither"),
        (["--prompts_file", "no.txt"], "--prompts_file: no file no.txt"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    base = [] if "--base" in arguments else ["--base", model_folder("sd15")]
    monkeypatch.setattr(sys, "argv", ["sample.py", *base, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / "sample.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert not list(tmp_path.iterdir())


def test_a_lora_of_another_base(lora):
    with pytest.raises(UserError, match="fox.safetensors: the LoRA is of another model"):
        models = images_cli.read_models([str(lora)], str(MODELS / "tiny-sdxl"), None, None)
        images_cli.draw_samples(models, PROMPTS, settings(), lora.parent / "out")


@pytest.mark.slow
def test_the_command(lora, tmp_path):
    command = [sys.executable, "scripts/sample.py", "--models", "base", str(lora)]
    command += [
        "--base",
        model_folder("sd15"),
        "--prompts",
        *PROMPTS,
        "--steps",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"grid: {tmp_path / 'grid.png'}\n"
    assert len(list(tmp_path.glob("base/*.png"))) == len(list(tmp_path.glob("fox/*.png"))) == 2
