"""Whatever is written is whole or not there, and one line says why it cannot be written."""

import json
import runpy
import subprocess
import sys

import pytest
from PIL import Image
from test_report import make_results, make_run, metrics_line

from spo.command_line.config_files import EVAL_BASE, load_config
from spo.errors import RunError, UserError, WriteError
from spo.evaluation import images_cli
from spo.evaluation.evaluator import evaluate
from spo.evaluation.image_sets import ImageSet
from spo.evaluation.report import write_report
from spo.evaluation.results import write_results
from spo.evaluation.run_report import draw_curves, write_run_report
from spo.evaluation.scores import ScoreFolder
from spo.run.pictures import Cell
from spo.run.validation import save_samples
from tests.small_runs import ROOT

PROMPTS = [f"a fox number {i} reading a map" for i in range(4)]


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MiB with 3.9 MiB of files on it, which `fill` fills; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder):
    """Takes all of the space that a disk has left."""
    with (folder / "filler").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def noise(side):
    return Image.effect_noise((side, side), 100).convert("RGB")


class Brightness:
    title, scale = "Brightness", 1.0


def results_of(folder):
    scores = {name: {"pickscore": (20.0, 21.0)} for name in ("base", "lora")}
    return make_results(folder, scores, ["a", "b"])


def run_of(folder):
    return make_run(
        folder / "run", [metrics_line(i) for i in (1, 2)], {"pretrained": {"model": ""}}
    )


def write_samples(folder, results, run):
    save_samples(folder, [Cell(noise(64), "a fox")], "policy", 1)


# The file that each writer writes, and the writer.
WRITERS = {
    "results.json": lambda folder, results, run: write_results(results, folder),
    "report.html": lambda folder, results, run: write_report(folder, results),
    "run/report.html": lambda folder, results, run: write_run_report(run),
    "run/curves.png": lambda folder, results, run: draw_curves(run),
    "images/0.png": lambda folder, results, run: ImageSet(
        "base", (folder / "images" / "0.png",)
    ).write(0, noise(64), "a fox", 0),
    "scores/scorer.json": lambda folder, results, run: ScoreFolder(
        folder / "scores", "constant", {}
    ).claim(Brightness()),
    "samples/00.png": write_samples,
}


@pytest.mark.parametrize("file", WRITERS)
def test_a_full_disk_leaves_what_was_there(disk, file):
    results, run = results_of(disk), run_of(disk)
    (disk / file).parent.mkdir(exist_ok=True)
    (disk / file).write_text("what was there")
    fill(disk)
    with pytest.raises(WriteError, match=rf"cannot write .*/{file}: No space left on device; mend"):
        WRITERS[file](disk, results, run)
    assert (disk / file).read_text() == "what was there"
    assert not list(disk.rglob("*.partial"))


@pytest.mark.parametrize("file", WRITERS)
def test_a_folder_in_the_way_is_named_and_kept(tmp_path, file):
    results, run = results_of(tmp_path), run_of(tmp_path)
    (tmp_path / file).mkdir(parents=True)
    with pytest.raises(WriteError, match=f"cannot write .*/{file}: Is a directory"):
        WRITERS[file](tmp_path, results, run)
    assert (tmp_path / file).is_dir() and not list(tmp_path.rglob("*.partial"))


def test_samples_of_two_epochs_are_not_mixed_under_one_index(tmp_path):
    cells = [Cell(noise(64), "a fox"), Cell(noise(64), "a bear")]
    save_samples(tmp_path, cells, "policy", 1)
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["epochs"] == 1
    (tmp_path / "samples" / "01.png").unlink()
    (tmp_path / "samples" / "01.png").mkdir()
    with pytest.raises(WriteError):
        save_samples(tmp_path, cells, "policy", 2)
    assert not (tmp_path / "samples" / "samples.json").exists()


# ---- whole commands ------------------------------------------------------------------------------


def evaluation_config(folder):
    config = load_config(EVAL_BASE, EVAL_BASE)
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS))
    config.update_from_flattened_dict(
        {
            "pretrained.model": str(ROOT / "tests" / "data" / "golden" / "models" / "tiny-sd15"),
            "prompts.source": str(folder.parent / "prompts.txt"),
            "sample.num_steps": 1,
            "mixed_precision": "no",
            "scorers": ("scorers_for_tests:image_brightness",),
            "logdir": str(folder),
            "run_name": "evaluation",
        }
    )
    return config


def test_an_evaluation_on_a_disk_that_fills_up_goes_on_later(disk, monkeypatch):
    config, write = evaluation_config(disk), ImageSet.write

    def full_from_the_third(images, index, *arguments):
        if index == 2:
            fill(disk)
        return write(images, index, *arguments)

    monkeypatch.setattr(ImageSet, "write", full_from_the_third)
    message = "00002.png: No space left on device; .*mend that, then the same command with --config"
    with pytest.raises(RunError, match=message) as stopped:
        evaluate(config)
    assert "run_name=evaluation goes on" in str(stopped.value)
    drawn = sorted(disk.rglob("*.png"))
    assert [path.name for path in drawn] == ["00000.png", "00001.png"]
    for path in drawn:
        with Image.open(path) as image:
            image.load()
    with pytest.raises(UserError, match="logdir: cannot write to .*No space left"):
        evaluate(config)  # full from the start: no model loads
    (disk / "filler").unlink()
    monkeypatch.undo()
    evaluate(config)
    assert (disk / "evaluation" / "table.md").exists()


def call(monkeypatch, script, *arguments):
    """Runs a script in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    return stopped.value.code


def test_prepared_prompts_are_whole_or_not_there(disk, tmp_path, monkeypatch, capsys):
    source, output = tmp_path / "prompts.txt", disk / "prompts.json"
    source.write_text("\n".join(f"prompt {i}" for i in range(20_000)))
    output.write_text("what was there")
    fill(disk)
    arguments = (f"--source={source}", "--num=0", f"--output={output}")
    assert call(monkeypatch, "prepare_prompts.py", *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert "cannot write" in error and "No space left" in error and error.count("\n") == 1
    assert output.read_text() == "what was there" and not list(disk.glob("*.partial"))


@pytest.mark.parametrize("script", ["prepare_prompts.py", "sample.py"])
def test_an_output_that_cannot_be_is_told_before_any_work(tmp_path, monkeypatch, capsys, script):
    (tmp_path / "file").write_text("in the way of a folder")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "prompts.txt").write_text("a fox")
    monkeypatch.setattr(images_cli, "Backbone", None)  # whoever loads a model fails
    options = {
        "prepare_prompts.py": [f"--source={tmp_path / 'prompts.txt'}", "--num=0", "--output"],
        "sample.py": [
            "--base",
            evaluation_config(tmp_path).pretrained.model,
            "--prompts=x",
            "--out",
        ],
    }[script]
    outputs = [tmp_path / "file" / "x.json"]
    outputs += [tmp_path / "folder.json"] if script == "prepare_prompts.py" else []
    for output in outputs:
        assert call(monkeypatch, script, *options, output) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {options[-1]}: cannot write {output}")
    assert (tmp_path / "folder.json").is_dir()
