"""Comparing models: which model a text names, images and scores that survive a kill, the comparison."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absl.flags import FlagValues
from helpers import GOLDEN, add_tiny_lora, load_backbone, model_folder, random_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from spo.command_line import flags
from spo.command_line.config_files import EVAL_BASE, leaves, load_config
from spo.errors import RunError, Stopped, UserError
from spo.evaluation import contents as contents_of
from spo.evaluation.evaluator import evaluate, plan_evaluation
from spo.evaluation.image_sets import ImageSet
from spo.evaluation.results import read_results
from spo.evaluation.scores import ScoreFolder
from spo.lora_io.model_spec import at_strengths, read_specs
from spo.lora_io.read import read_lora_file
from spo.lora_io.write import save_lora, write_peft
from spo.models.backbone import ModelSource
from spo.run.folder import locked
from spo.scorers import ImageScorer, image_scorer, named_files

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [f"a fox number {i} reading a map" for i in range(6)]
BASE = ModelSource(model_folder("sd15"))


def write_lora(path, family="sd15", seed=1):
    lora = add_tiny_lora(load_backbone(family))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_lora(path, lora, random_weights(lora, seed), {})
    return path


@pytest.fixture
def config(tmp_path):
    """Six prompts of the random tiny SD1.5, scored by how bright the images are."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = load_config(EVAL_BASE, EVAL_BASE)
    config.update_from_flattened_dict(
        {
            "models": ("base", f"lora={write_lora(tmp_path / 'lora.safetensors')}"),
            "pretrained.model": model_folder("sd15"),
            "prompts.source": str(tmp_path / "prompts.txt"),
            "sample.num_steps": 2,
            "sample.batch_size": 2,
            "mixed_precision": "no",
            "scorers": ("scorers_for_tests:image_brightness",),
            "score_batch_size": 3,
            "logdir": str(tmp_path / "runs"),
            "run_name": "evaluation",
        }
    )
    return config


def folder_of(config):
    return Path(config.logdir) / config.run_name


def contents(folder):
    """Everything an evaluation wrote, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config


def all_scores(results):
    """The scores of each model by the one scorer."""
    return [results.scores(model, results.scorers[0]) for model in results.models]


# ---- which model a text names ------------------------------------------------------------------


def test_texts_name_models(tmp_path):
    file = write_lora(tmp_path / "runs" / "one" / "pytorch_lora_weights.safetensors")
    other = write_lora(tmp_path / "other.safetensors")
    images = tmp_path / "images"
    images.mkdir()
    (images / "0.png").touch()
    unet = tmp_path / "dpo" / "unet"
    unet.mkdir(parents=True)
    (unet / "config.json").write_text("{}")
    texts = (
        "base",
        str(file.parent),
        f"half={file.parent}:0.5",
        f"both={file.parent}:-1+{other}:2",
        f"full={model_folder('sd15')}",
        f"dpo={unet.parent}",
        f"there={images}",
    )
    base, run, half, both, full, dpo, there = read_specs(texts, BASE, "sd15", "models")
    assert (base.name, base.source, base.loras) == ("base", BASE, ())
    assert run.name == "one"
    assert list(half.loras) == [(file, 0.5)]
    assert list(both.loras) == [(file, -1.0), (other, 2.0)]
    assert full.source == ModelSource(model_folder("sd15")) and not full.loras
    assert dpo.source == ModelSource(BASE.model, unet=str(unet.parent))
    assert there.source is None and there.images == images


def test_what_exists_is_no_name_and_no_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("runs/a+b", "runs/a", "runs/lr=1e-4", "x=y", "runs/a:2")
    files = {name: write_lora(Path(name) / "pytorch_lora_weights.safetensors") for name in names}
    for text, name, loras in (
        ("runs/a+b", "a_b", [("runs/a+b", 1)]),
        ("runs/a+b:0.5+runs/a", "a_b", [("runs/a+b", 0.5), ("runs/a", 1)]),
        ("sum=runs/a+runs/a+b", "sum", [("runs/a", 1), ("runs/a+b", 1)]),
        ("runs/lr=1e-4", "lr_1e-4", [("runs/lr=1e-4", 1)]),
        ("new=runs/lr=1e-4:-2", "new", [("runs/lr=1e-4", -2)]),
        ("x=y", "x_y", [("x=y", 1)]),
        ("x=runs/a", "x", [("runs/a", 1)]),
        ("x=~/runs/a:2", "x", [("runs/a:2", 1)]),
    ):
        (spec,) = read_specs([text], BASE, "sd15", "models")
        assert spec.name == name
        found = [(path.resolve(), weight) for path, weight in spec.loras]
        assert found == [(tmp_path / files[p], weight) for p, weight in loras]


@pytest.mark.parametrize(
    "texts, message",
    [
        ((), "there is no model"),
        (("base", "base"), "two models are called 'base'"),
        (("a/b=base",), "'a/b' is no name"),
        (("./nowhere",), "no file './nowhere'"),
        (("x=base:0.5.5",), "no file 'base:0.5.5'"),
        ((f"x={GOLDEN / 'models' / 'tiny-sdxl'}",), "family='sd15' needs"),
    ],
)
def test_texts_that_name_no_model(texts, message):
    with pytest.raises(UserError, match="^models: .*" + message):
        read_specs(texts, BASE, "sd15", "models")


def test_a_lora_is_drawn_at_every_strength(tmp_path):
    one, two = (write_lora(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    full = f"full={model_folder('sd15')}"
    texts = ("base", f"half={one}:0.5", f"both={one}:-1+{two}:2", full)
    specs = read_specs(texts, BASE, "sd15", "models")
    assert at_strengths(specs, (), "lora_scales") == specs
    assert [(spec.lora, spec.strength) for spec in specs] == [
        ("", 0),
        (str(one), 0.5),
        (f"{one}:-1+{two}:2", 1),
        ("", None),
    ]
    found = at_strengths(specs, (0.25, 2, 0.25), "lora_scales")
    names = ["base", "half_0.25", "half_2", "both_0.25", "both_2", "full"]
    assert [spec.name for spec in found] == names
    assert [spec.strength for spec in found] == [0, 0.125, 1, 0.25, 2, None]
    assert [spec.loras for spec in found[1:5]] == [
        ((one, 0.125),),
        ((one, 1),),
        ((one, -0.25), (two, 0.5)),
        ((one, -2), (two, 4)),
    ]
    assert found[1].lora == found[2].lora == str(one) and found[1].text == texts[1]
    taken = read_specs((f"a={one}", f"a_2={one}"), BASE, "sd15", "models")
    with pytest.raises(UserError, match="^lora_scales: two models are called 'a_2_1'"):
        at_strengths([*taken, replace(taken[0], name="a_2_1", loras=())], (1,), "lora_scales")


# ---- images and scores -------------------------------------------------------------------------


def test_an_image_is_read_only_for_its_own_prompt(tmp_path):
    images = ImageSet("base", (tmp_path / "0.png", tmp_path / "1.png"))
    assert images.missing(1) == [range(0, 1), range(1, 2)]
    images.write(0, Image.new("RGB", (4, 4), "red"), "a prompt\nwith 🦊", 7)
    assert images.missing(1) == [range(1, 2)] and images.missing(2) == [range(0, 2)]
    assert images.read(0, "a prompt\nwith 🦊").getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UserError, match="0.png shows 'a prompt.* but prompt 0 is 'another'"):
        images.read(0, "another")
    whole = images.files[0].read_bytes()
    images.files[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="1.png is missing or is no image"):
        images.read(1, "a prompt\nwith 🦊")


class Constant:
    title, scale = "Constant", 10.0

    def __init__(self, value):
        self.value = value

    def score_images(self, images, prompts):
        return torch.full((len(images),), self.value)


def test_scores_of_an_image_that_changed_are_computed_again(tmp_path):
    images = ImageSet("base", tuple(tmp_path / f"{i}.png" for i in range(2)))
    for i in range(2):
        images.write(i, Image.new("RGB", (4, 4)), PROMPTS[i], 0)
    scores = ScoreFolder(tmp_path / "scores", "constant", {"a": 1})
    scores.claim(Constant(2.0))
    for batch in scores.missing(images, 1):
        scores.score(Constant(2.0), images, batch, PROMPTS)
    assert scores.missing(images, 1) == []
    assert scores.read(images, 1) == [20.0, 20.0]
    images.write(1, Image.new("RGB", (4, 4), "blue"), PROMPTS[1], 0)
    assert scores.missing(images, 1) == [range(1, 2)]
    with pytest.raises(RunError, match="constant gives nan to .*1.png"):
        scores.score(Constant(float("nan")), images, range(1, 2), PROMPTS)
    with pytest.raises(UserError, match="scorer_options.constant: .*scores of {'a': 1}"):
        ScoreFolder(tmp_path / "scores", "constant", {"a": 2}).info()


# ---- whole evaluations -------------------------------------------------------------------------


def test_models_are_compared_on_equal_seeds(config, capsys):
    copy = config.models[1].removeprefix("lora=")
    evaluate(changed(config, models=("base", f"zero={copy}:0", f"lora={copy}")))
    results = read_results(folder_of(config))
    base, zero, lora = all_scores(results)
    assert base == pytest.approx(zero, abs=1e-3) and len(set(base)) == len(PROMPTS)
    assert max(abs(a - b) for a, b in zip(base, lora, strict=True)) > 0.1
    written = json.loads((folder_of(config) / "results.json").read_text())
    rows = {row["model"]: row for row in written["summary"]}
    assert rows["base"]["difference"] is None and rows["base"]["n"] == 6
    assert rows["zero"]["difference"]["mean"] == pytest.approx(0, abs=1e-3)
    assert written["prompts"][2]["prompt"] == PROMPTS[2]
    with Image.open(folder_of(config) / written["prompts"][2]["images"]["lora"]["file"]) as image:
        assert image.text["prompt"] == PROMPTS[2]
        assert image.text["seed"] == str(written["prompts"][2]["seed"])
    table = (folder_of(config) / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| Brightness x 100 | lora  |" in table


def test_identical_models_have_difference_zero_and_win_half(config):
    evaluate(changed(config, models=("base", "again=base")))
    summary = json.loads((folder_of(config) / "results.json").read_text())["summary"]
    assert summary[1]["difference"] == {"mean": 0, "low": 0, "high": 0}
    assert summary[1]["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert summary[1]["ties"] == 6


def test_strengths_of_a_lora(config):
    evaluate(changed(config, lora_scales=(0, 0.5, 1.25)))
    folder, lora = folder_of(config), config.models[1].removeprefix("lora=")
    results = read_results(folder)
    found = [(model.name, model.lora, model.strength) for model in results.models]
    scaled = [(f"lora_{strength:g}", lora, strength) for strength in (0, 0.5, 1.25)]
    assert found == [("base", "", 0), *scaled]
    base, off, half, more = all_scores(results)
    assert base == pytest.approx(off, abs=1e-3)
    assert max(abs(a - b) for a, b in zip(half, more, strict=True)) > 0.1
    # By hand, of the strength that is 1 times the strength of its text.
    evaluate(changed(config, models=("base", f"lora={lora}:1.25"), run_name="one"))
    one = read_results(folder.parent / "one")
    assert all_scores(one) == [base, more] and one.models[1].strength == 1.25
    assert "Strength of the LoRA" in (folder / "report.html").read_text()
    # Results from before strengths were recorded.
    written = json.loads((folder / "results.json").read_text())
    for model in written["models"]:
        del model["lora"], model["strength"]
    (folder / "results.json").write_text(json.dumps(written))
    assert read_results(folder).strengths() == {} != results.strengths()


def test_drawing_and_scoring_apart_and_a_folder_of_images(config):
    evaluate(changed(config, scorers=()))
    folder = folder_of(config)
    drawn = contents(folder / "images")
    assert not (folder / "results.json").exists()
    # Another evaluation takes the images as files: the scores are the same, and no model is needed.
    images = tuple(f"{name}={folder / 'images' / name}" for name in ("base", "lora"))
    evaluate(changed(config, models=images, run_name="scored"))
    evaluate(config)
    assert contents(folder / "images") == drawn
    both = [read_results(Path(config.logdir) / name) for name in ("evaluation", "scored")]
    assert all_scores(both[0]) == all_scores(both[1])
    file = both[1].prompts[0].images["base"].file
    assert file == str((folder / "images" / "base" / "00000.png").resolve())


@pytest.mark.slow
def test_two_processes_make_what_one_makes(config, tmp_path):
    evaluate(config)
    two = changed(config, logdir=str(tmp_path / "two"))
    file = tmp_path / "two.json"
    file.write_text(two.to_json())
    subprocess.run(
        [sys.executable, "-m", "spo.launch", "scripts/evaluate.py", "--cpu", "--num_processes=2"]
        + [f"--config={file}", *(f"--config.scorers={name}" for name in two.scorers)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    expected, found = contents(folder_of(config)), contents(folder_of(two))
    for name in ("config.json", "results.json", "report.html"):  # they tell the folder
        assert expected.pop(name) and found.pop(name)
    assert expected == found
    scores = [all_scores(read_results(folder_of(c))) for c in (config, two)]
    assert scores[0] == scores[1]


KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
from spo.command_line import flags
from spo.command_line.config_files import EVAL_BASE, load_config
from spo.evaluation import evaluator
config = load_config(sys.argv[1], EVAL_BASE)
for line in sys.stdin:  # each line is a start of the evaluation, in a process that can be killed
    child = os.fork()
    if child == 0:
        evaluator.evaluate(config)
        os._exit(0)
    print("child", child, flush=True)
    print("status", os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.slow
def test_an_evaluation_killed_ten_times_ends_as_one_that_was_not(config, tmp_path):
    evaluate(config)
    folder = folder_of(config)
    expected = contents(folder)
    folder.rename(tmp_path / "undisturbed")
    (tmp_path / "config.json").write_text(config.to_json())
    starter = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "config.json")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    rng, found = random.Random(0), []
    for _ in range(10):
        starter.stdin.write("\n")
        starter.stdin.flush()
        child = int(next(line for line in starter.stdout if line.startswith("child"))[5:])
        # Killed when so many more files are there, of images or of scores, or while one is written.
        wanted = sum(1 for _ in folder.rglob("*.*")) + rng.randint(1, 4)
        while (
            sum(1 for _ in folder.rglob("*.*")) < wanted and not (folder / "report.html").exists()
        ):
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        status = int(next(line for line in starter.stdout if line.startswith("status"))[6:])
        found.append((status, len(list(folder.rglob("*.png"))), len(list(folder.rglob("*.json")))))
        if (folder / "results.json").exists():  # nothing is left to do: start anew
            folder.rename(tmp_path / f"through{len(found)}")
    starter.stdin.write("\n")
    starter.stdin.close()
    starter.stdout.read()
    starter.wait()
    assert len(set(found)) > 4 and sum(status == signal.SIGKILL for status, *_ in found) > 4, found
    assert contents(folder) == expected


class StopAfter(ImageScorer):
    """Brightness, and SIGTERM to this process after so many batches."""

    title, scale, batches = "Brightness", 100.0, 0

    def score_images(self, images, prompts):
        self.batches += 1
        if self.batches == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])


def stop_after(device):
    return StopAfter()


def test_a_signal_keeps_every_whole_batch_and_the_next_call_goes_on(config):
    config = changed(config, scorers=("test_evaluate:stop_after",))
    with pytest.raises(Stopped, match="--config.run_name=evaluation goes on") as stopped:
        evaluate(config)
    assert stopped.value.exit_status == 75
    assert len(list(folder_of(config).glob("scores/*/*/*.json"))) == 3  # of 2 x 2
    evaluate(config)
    assert (folder_of(config) / "table.md").exists()


def test_the_config_of_strengths(config):
    scales = load_config("config/eval_scales.py", EVAL_BASE)
    own = ("models", "pretrained", "prompts.source", "scorers", "logdir")
    scales.update_from_flattened_dict(
        {key: value for key, value in leaves(config).items() if key.startswith(own)}
    )
    scales.prompts.num = 5  # of six; 100 of 487 by default
    strengths = ("0.25", "0.5", "0.75", "1", "1.25")
    plan = plan_evaluation(scales, 1)
    assert [model.name for model in plan.models] == ["base", *(f"lora_{s}" for s in strengths)]
    assert len(plan.prompts.prompts) == 5
    flags._lay_over(scales, ["", "--config.lora_scales=0.5,2"], FlagValues())
    assert [model.strength for model in plan_evaluation(scales, 1).models] == [0, 0.5, 2]


# ---- bad input ---------------------------------------------------------------------------------

BAD = {
    "no such prompts": ({"prompts.source": "no.txt"}, "prompts.source: no file"),
    "unknown scorer": ({"scorers": ("beauty",)}, "scorers: 'beauty' is none of"),
    "options of no scorer": ({"scorer_options": {"x": {}}}, "scorer_options.x: there is no such"),
    "no steps": ({"sample.num_steps": 0}, "sample.num_steps: 0 must be a whole number from 1"),
    "no batch": ({"score_batch_size": 0}, "score_batch_size: 0 must be a whole number from 1"),
    "unknown precision": ({"mixed_precision": "fp8"}, "mixed_precision: 'fp8' is none of"),
    "base of another family": ({"family": "sdxl"}, "family='sdxl' needs"),
    "strengths of nothing": (
        {"models": ("base",), "lora_scales": (0.5, 1)},
        "lora_scales: there is no LoRA",
    ),
    "a word for a strength": ({"lora_scales": ("half",)}, "lora_scales: expected only numbers"),
    "no strength": (
        {"lora_scales": (float("nan"),)},
        "lora_scales: every strength must be a finite",
    ),
    "missing LoRA": ({"models": ("base", "./no.safetensors")}, "models: no file"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_before_anything_is_written(config, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate(changed(config, **changes))
    assert not Path(config.logdir).exists()


def test_a_folder_with_another_number_of_images(config, tmp_path):
    folder = tmp_path / "found"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
    with pytest.raises(UserError, match="found has 5 images for 6 prompts"):
        plan_evaluation(changed(config, models=(f"found={folder}",)), 1)


def test_a_lora_of_another_base_is_one_line(config, tmp_path):
    lora = write_lora(tmp_path / "xl.safetensors", "sdxl")
    with pytest.raises(UserError, match="xl.safetensors: the LoRA is of another model"):
        evaluate(changed(config, models=("base", f"xl={lora}")))
    # What the base had drawn is there, and the next call takes it up.
    assert len(list(folder_of(config).rglob("base/*.png"))) == 6


def test_options_of_a_scorer_whose_name_has_a_dot(config, tmp_path):
    name = "tests.scorers_for_tests:brightness"
    config = changed(config, scorers=(name,), models=("base",))
    config.scorer_options[name] = {"sign": 2}
    evaluate(config)
    again = load_config(str(folder_of(config) / "config.json"), EVAL_BASE)
    assert again.scorer_options[name].sign == 2
    assert plan_evaluation(again, 1).settings.scorer_options == {name: {"sign": 2}}
    for key in (f"scorer_options.{name}.sign", f'scorer_options["{name}"].sign'):
        other = load_config(str(folder_of(config) / "config.json"), EVAL_BASE)
        flags._lay_over(other, ["", f"--config.{key}=3"], FlagValues())
        with pytest.raises(UserError, match="scores of {'sign': 2}, not {'sign': 3}"):
            plan_evaluation(other, 1)


def test_an_evaluation_that_runs_is_left_alone(config):
    evaluate(config)
    before = contents(folder_of(config))
    with (
        locked(folder_of(config)),
        pytest.raises(UserError, match="^run_name: .* is in use by pro"),
    ):
        evaluate(changed(config, models=("base",)))
    assert contents(folder_of(config)) == before


def test_an_evaluation_is_not_mixed_with_another(config, tmp_path):
    evaluate(config)
    before = contents(folder_of(config))
    other = write_lora(tmp_path / "other.safetensors", seed=2)
    with pytest.raises(UserError, match="lora holds images of another loras; choose another NAME="):
        evaluate(changed(config, models=("base", f"lora={other}")))
    with pytest.raises(UserError, match="base holds images of another seed"):
        evaluate(changed(config, **{"sample.seed": 1}))
    with pytest.raises(UserError, match="is an evaluation of other prompts"):
        evaluate(changed(config, **{"prompts.num": 3}))
    assert contents(folder_of(config)) == before
    # A third model is added, and the others are not drawn again.
    evaluate(changed(config, models=(*config.models, f"other={other}")))
    after = contents(folder_of(config))
    assert all(after[name] == before[name] for name in before if name.startswith("images"))
    assert len(read_results(folder_of(config)).models) == 3


# ---- another model or scorer under the same name ------------------------------------------------


def scale_weights(file, factor=1.5):
    tensors = {name: factor * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def own_model(config, folder):
    """The config with a copy of its base model that a test may change."""
    shutil.copytree(config.pretrained.model, folder)
    return changed(config, models=("base",), **{"pretrained.model": str(folder)})


@pytest.mark.parametrize("digested", [2**30, 0])
@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
)
def test_images_of_a_model_that_changed_are_not_taken(
    config, tmp_path, monkeypatch, file, digested
):
    monkeypatch.setattr(contents_of, "_DIGESTED", digested)
    config = own_model(config, tmp_path / "model")
    evaluate(config)
    before = contents(folder_of(config))
    evaluate(config)
    assert contents(folder_of(config)) == before
    path = tmp_path / "model" / file
    if path.suffix == ".json":
        path.write_text(path.read_text().replace("0.012", "0.02"))
    else:
        scale_weights(path)
    with pytest.raises(UserError, match="base holds images of another content of model; choose"):
        evaluate(config)
    assert contents(folder_of(config)) == before
    anew = changed(config, run_name="anew")
    evaluate(anew)
    scores = [all_scores(read_results(folder_of(each))) for each in (config, anew)]
    assert scores[0] != scores[1]


def test_a_model_written_again_is_the_same(config, tmp_path):
    config = own_model(config, tmp_path / "model")
    evaluate(changed(config, scorers=()))
    for path in (tmp_path / "model").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes())  # of another time
    (tmp_path / "model" / "README.md").write_text("which no model is made of")
    evaluate(config)


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_images_by_a_part_that_changed_are_not_taken(config, tmp_path, part):
    folder = tmp_path / "part"
    if part == "vae":
        shutil.copytree(Path(config.pretrained.model) / "vae", folder)
        config = changed(config, models=("base",), **{"pretrained.vae": str(folder)})
    else:
        shutil.copytree(Path(config.pretrained.model) / "unet", folder / "unet")
        config = changed(config, models=(f"other={folder}",))
    evaluate(config)
    scale_weights(next(folder.rglob("*.safetensors")))
    with pytest.raises(UserError, match=f"images of another content of {part};"):
        evaluate(config)


def test_images_by_a_peft_lora_of_another_alpha_are_not_taken(config, tmp_path):
    lora = read_lora_file(Path(config.models[1].removeprefix("lora=")), "models")
    write_peft(lora, folder := tmp_path / "peft")
    config = changed(config, models=(f"lora={folder}",))
    evaluate(config)
    file = folder / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 4', '"lora_alpha": 1'))
    with pytest.raises(UserError, match="images of another loras;"):
        evaluate(config)


class Weighted(ImageScorer):
    """Brightness times the number in a file."""

    title = "Weighted"

    def __init__(self, file):
        self.weight = float(Path(file).read_text())

    def score_images(self, images, prompts):
        values = [float(image.getpixel((0, 0))[0]) for image in images]
        return self.weight * torch.tensor(values)


def weighted(device, *, files):
    return Weighted(files[0])


def test_scores_by_a_scorer_that_changed_are_not_taken(config, tmp_path):
    (tmp_path / "weight").write_text("1")
    name = "test_evaluate:weighted"
    options = {name: {"files": [str(tmp_path / "weight"), "some text"]}}
    config = changed(config, models=("base",), scorers=(name,), scorer_options=options)
    evaluate(config)
    evaluate(config)
    (tmp_path / "weight").write_text("2")
    with pytest.raises(UserError, match="scorers: .* scores of another content of files; choose"):
        evaluate(config)
    shutil.rmtree(folder_of(config) / "scores")
    first = all_scores(read_results(folder_of(config)))[0]
    evaluate(config)
    assert all_scores(read_results(folder_of(config)))[0] == tuple(2 * score for score in first)


def test_scores_by_published_models_that_changed_are_not_taken(config, tmp_path):
    shutil.copy(GOLDEN / "models" / "tiny-spm.bin", tmp_path / "spm.bin")
    shutil.copytree(GOLDEN / "models" / "tiny-clip", tmp_path / "clip")
    own = {name: str(tmp_path / "clip") for name in ("backbone", "processor")}
    options = {"step_aware_clip": own | {"checkpoint": str(tmp_path / "spm.bin")}, "pickscore": own}
    config = changed(config, models=("base",), scorers=tuple(options), scorer_options=options)
    evaluate(config)
    weights = torch.load(tmp_path / "spm.bin", weights_only=True)
    torch.save({name: 1.5 * tensor for name, tensor in weights.items()}, tmp_path / "spm.bin")
    with pytest.raises(UserError, match="step_aware_clip holds scores of another content of check"):
        evaluate(config)
    scale_weights(tmp_path / "clip" / "model.safetensors")
    found = changed(config, scorers=("pickscore",), scorer_options={"pickscore": own})
    with pytest.raises(UserError, match="pickscore holds .* another content of backbone, content"):
        evaluate(found)


def test_a_scorer_whose_code_changed_is_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_scorer.py").write_text("def load(device): ...")
    source = image_scorer("my_scorer:load", {})
    before = contents_of.contents(named_files(source))
    (tmp_path / "my_scorer.py").write_text("def load(device): return 1")
    assert before.keys() == {"content of code"}
    assert contents_of.contents(named_files(source)) != before


def test_a_repo_of_the_hub_is_told_by_its_commit(monkeypatch):
    commits = {("user/clip", None): "aaa", ("user/clip", "old"): "bbb", ("timm/vit", None): "ccc"}

    def repo_info(repo, revision):
        return SimpleNamespace(sha=commits[repo, revision])

    monkeypatch.setattr(contents_of, "repo_info", repo_info)
    source = ModelSource("user/clip", revision="old", vae="user/clip")
    found = contents_of.source_contents(source)
    assert found == {"content of model": "bbb", "content of vae": "aaa"}
    names = {"checkpoint": "hf://timm/vit/open_clip_model.safetensors", "none": "no/repo"}
    assert contents_of.contents(names) == {"content of checkpoint": "ccc"}
    named = named_files(image_scorer("aesthetic", {}))
    assert named["checkpoint"].startswith("hf://timm/") and named["head"].startswith("hf://trl-lib")


def test_damaged_records_are_one_line(config):
    evaluate(config)
    for name in ("prompts.json", "images/base/model.json"):
        file = folder_of(config) / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{name} is damaged"):
            evaluate(config)
        file.write_bytes(whole)
