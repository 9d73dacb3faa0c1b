"""Runs that look at themselves between epochs: judges, verdicts, the epoch to ship, stopping."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import scorer_source
from ml_collections import ConfigDict
from PIL import Image
from safetensors.torch import load_file

from spo.errors import UserError
from spo.guard.judges import find_judges
from spo.lora_io.write import parameter_names
from spo.models.lora import add_lora
from spo.models.plain_images import ImageSettings, sample_images
from spo.run.checkpoint_folder import best
from spo.scorers import candidate_scorer
from spo.scorers.pixels import to_pil
from tests.small_runs import LORA, UNEQUAL, read_metrics, run, run_in_processes, small_config

LIGHT, DARK = (f"tests.scorers_for_tests:{name}" for name in ("image_brightness", "ImageDarkness"))


def options(**by_judge):
    """Options of judges, whose names may have dots."""
    return ConfigDict(by_judge, allow_dotted_keys=True)


JUDGED = {
    "eval__num_judged": 3,
    "eval__seeds_per_prompt": 2,
    "eval__batch_size": 2,
    "eval__judges": (LIGHT,),
    "eval__judge_options": options(),
}


def evaluations(folder):
    """The lines of metrics.jsonl that hold a verdict."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "evaluation" in line]


def numbers(folder, epochs):
    """The scores of every prompt after `epochs`, by name."""
    return json.loads((folder / "validation" / f"epoch_{epochs:04d}_policy.json").read_text())[
        "scores"
    ]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run with a judge; not to be changed."""
    return run(tmp_path_factory.mktemp("judged") / "run", **JUDGED)


def test_scores_are_those_of_the_images_that_each_epoch_draws(judged, own_backbone):
    backbone, config = own_backbone("sd15"), small_config(judged)
    prompts = Path(config.eval.prompts).read_text().splitlines()[:3]
    lora = add_lora(backbone.unet, 4, 4, config.lora.target_modules, seed=0)
    light, saturation = [], []
    for epochs in (0, 1, 2):
        if epochs:
            file = judged / "checkpoints" / f"epoch_{epochs:04d}" / LORA
            lora.assign(parameter_names(load_file(file)))
        values = []
        for seed in (0, 1):  # eval.seed, and the next
            settings = ImageSettings(2, config.eval.guidance_scale, seed)
            with lora.using(lora.parameters if epochs else None):
                drawn = to_pil(sample_images(backbone, prompts, range(3), settings))
            values.append([np.asarray(image) / 255 for image in drawn])
        light.append(100 * np.mean(values, axis=(0, 2, 3, 4)))
        high, low = np.max(values, axis=-1), np.min(values, axis=-1)
        saturation.append(np.mean((high - low) / high, axis=(0, 2, 3)))
        scores = numbers(judged, epochs)
        assert scores[f"judges/{LIGHT}"] == pytest.approx(light[-1], abs=0.05)
        assert scores["pixels/saturation"] == pytest.approx(saturation[-1], abs=0.01)
    lines = evaluations(judged)
    assert [line["evaluation"] for line in lines] == [1, 2]
    for line, now in zip(lines, light[1:], strict=True):
        assert line["judges"][LIGHT]["mean"] == pytest.approx(np.mean(now - light[0]), abs=0.05)
    assert [line["rollout"] for line in lines] == [2, 4]
    gains = [line["judges"][LIGHT]["mean"] for line in lines]
    ship = int(np.argmax([0, *gains]))
    assert lines[-1]["ship"] == ship
    assert best(judged) == (judged / "checkpoints" / f"epoch_{ship:04d}" if ship else None)


def test_the_grid_is_of_the_first_images_alone(judged):
    samples = json.loads((judged / "samples" / "samples.json").read_text())
    assert samples["epochs"] == 2 and len(samples["prompts"]) == 2
    assert Image.open(judged / "validation" / "epoch_0002_policy.png").width > 256


def test_judging_changes_nothing_of_the_training(judged, tmp_path):
    unjudged = run(tmp_path / "run")
    ours, theirs = ((each / LORA).read_bytes() for each in (judged, unjudged))
    assert ours == theirs
    assert not evaluations(unjudged) and best(unjudged) is None


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    for count in (1, 2):
        assert run_in_processes(tmp_path / str(count), count, **JUDGED, num_epochs=1) == [0] * count
    one, two = (numbers(tmp_path / str(count), 0) for count in (1, 2))
    assert one == two  # the same batches, wherever they are drawn
    assert one.keys() == {"reward", f"judges/{LIGHT}"} | {
        f"pixels/{name}" for name in ("saturation", "contrast", "clipped", "high_frequencies")
    }


def test_an_evaluation_is_made_once_and_a_later_one_is_forgotten(judged, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(judged, folder, symlinks=True)
    shutil.rmtree(folder / "checkpoints" / "epoch_0002")
    first = folder / "validation" / "epoch_0001_policy.json"
    before = first.stat().st_mtime_ns
    marked = json.loads((folder / "validation" / "epoch_0002_policy.json").read_text())
    marked["scores"]["reward"] = [1e6] * 3
    (folder / "validation" / "epoch_0002_policy.json").write_text(json.dumps(marked))
    run(folder, **JUDGED)
    assert first.stat().st_mtime_ns == before
    assert numbers(folder, 2) == numbers(judged, 2)
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in UNEQUAL} for line in evaluations(f)]
        for f in (folder, judged)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("judges", "given", "warning"),
    [
        (("tests.scorers_for_tests:broken_judge",), {}, "no such weights anywhere"),
        ((DARK,), {DARK: {"bad_prompt": "a red fox curled up asleep in fresh snow"}}, "not finite"),
        (("hpsv2.1",), {"hpsv2.1": {"checkpoint": "no/such/file.pt"}}, "no file "),
    ],
)
def test_a_judge_that_fails_costs_a_line(tmp_path, capsys, judges, given, warning):
    changes = JUDGED | {"eval__judges": (*judges, LIGHT), "eval__judge_options": options(**given)}
    folder = run(tmp_path / "run", **changes, num_epochs=1)
    lines = [each for each in capsys.readouterr().out.splitlines() if "without the judge" in each]
    assert len(lines) == 1 and judges[0] in lines[0] and warning in lines[0]
    (line,) = evaluations(folder)
    assert line["judges"].keys() == {LIGHT}


BRIGHT = {
    "preference__scorer": "tests.scorers_for_tests:brightness",
    "algorithm": "gradspo",
    "num_epochs": 4,
    "prompts__num": 8,
    "sample__batch_size": 8,
    "sample__num_candidates": 4,
    "train__batch_size": 16,
    "train__gradient_accumulation_steps": 1,
    "train__learning_rate": 3e-3,
    "eval__num_judged": 16,
    "eval__batch_size": 16,
    "save_interval": 9,
}


def test_a_run_that_pleases_its_scorer_alone_ends_if_so_told(tmp_path, capsys):
    changes = JUDGED | BRIGHT | {"eval__judges": (DARK,), "eval__stop_when_overoptimised": True}
    folder = run(tmp_path / "run", **changes)
    (line,) = evaluations(folder)
    assert line["reward"]["low"] > 0 > line["judges"][DARK]["high"]
    assert (line["verdict"], line["ship"]) == ("worse than untrained", 0)
    assert "ended after epoch 1 by eval.stop_when_overoptimised" in capsys.readouterr().out
    assert [each.name for each in (folder / "checkpoints").iterdir()] == ["epoch_0001"]
    assert (folder / LORA).exists() and best(folder) is None
    run(folder, **changes)  # taken up again, it ends at once
    assert len(read_metrics(folder)) == 2 and len(evaluations(folder)) == 1
    run(folder, **changes | {"eval__stop_when_overoptimised": False, "num_epochs": 2})
    assert [line["evaluation"] for line in evaluations(folder)] == [1, 2]


def test_the_best_epoch_has_a_checkpoint_whatever_the_interval(tmp_path):
    folder = run(tmp_path / "run", **JUDGED | BRIGHT | {"num_epochs": 2})
    assert [line["verdict"] for line in evaluations(folder)] == ["healthy"] * 2
    assert best(folder).name == "epoch_0002"
    assert [line["ship"] for line in evaluations(folder)] == [1, 2]


CLIP = {name: "assets/tiny/clip" for name in ("backbone", "processor")}


def test_the_training_scorer_and_its_backbone_are_no_independent_judges():
    spm = scorer_source("step_aware_clip")
    own = {name: spm.options[name] for name in ("backbone", "processor")}
    found, lines = find_judges(("pickscore",), {"pickscore": own}, spm)
    assert [each.name for each in found] == ["pickscore"]
    assert "not independent" in lines[0] and own["backbone"] in lines[0]
    found, lines = find_judges(("pickscore",), {"pickscore": CLIP}, spm)
    assert len(found) == 1 and not lines
    pickscore = candidate_scorer("pickscore", {}, **CLIP, checkpoint="", dtype="float32")
    found, lines = find_judges(("pickscore",), {"pickscore": CLIP}, pickscore)
    assert not found and "what the run trains on" in lines[0]
    light = candidate_scorer(LIGHT, {})
    found, lines = find_judges((LIGHT, DARK), {}, light)
    assert [each.name for each in found] == [DARK] and LIGHT in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__judges": ("hpsv3",)}, "eval.judges: .*hpsv3"),
        ({"eval__judges": (3,)}, "eval.judges: expected only names"),
        ({"eval__judges": ("latent_reward",)}, "eval.judges: latent_reward looks at latents"),
        (
            {"eval__judge_options": options(estetic={})},
            "eval.judge_options.estetic: there is no such",
        ),
        (
            {"eval__judge_options": options(**{LIGHT: {"colour": "red"}})},
            "eval.judge_options.*image_brightness takes other options",
        ),
        (
            {"hub__repo_id": "user/name", "hub__checkpoint": "best", "eval_interval": 0},
            "hub.checkpoint: no checkpoint is the best where nobody judges; set eval_interval",
        ),
        ({"eval__num_judged": -1}, "eval.num_judged: -1 must be"),
        (
            {"eval__judges": (), "eval__stop_when_overoptimised": True},
            "nobody judges; set eval.judges",
        ),
    ],
)
def test_bad_settings_are_told_before_anything_loads(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **JUDGED | changes)
    assert not (tmp_path / "run").exists()


def test_a_scorer_of_latents_gives_a_reward_too(tmp_path):
    from tests.small_runs import JUDGED as LATENT

    changes = {name.replace(".", "__"): value for name, value in LATENT["lpo_sd15"].items()}
    folder = run(tmp_path / "run", **changes | JUDGED | {"num_epochs": 1, "eval__judges": ()})
    (line,) = evaluations(folder)
    assert line["reward"]["low"] <= line["reward"]["mean"] <= line["reward"]["high"]
    assert line["judges"] == {} and line["verdict"] == "cannot tell"
    assert torch.tensor(numbers(folder, 1)["reward"]).isfinite().all()
