"""The picture of a rollout: frames, scores and the candidate that continues."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spo.command_line.config_files import load_config
from spo.evaluation import rollout_picture
from spo.method.build import read_recipe

ROOT = Path(__file__).resolve().parent.parent


def test_the_best_is_green_the_worst_red_and_one_continues(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(rollout_picture, "grid", lambda rows, *labels, side: (rows, *labels))
    config = load_config("tests/data/random_models.py")
    config.sample.num_steps, config.sample.branch_from = 4, 2
    rows, title, labels = rollout_picture.draw_rollout(read_recipe(config), "a fox", "", seed=0)
    assert title == "a fox  (base model)"
    assert len(rows) == 2 and [len(row) for row in rows] == [config.sample.num_candidates] * 2
    for row in rows:
        ranked = sorted(row, key=lambda cell: float(cell.caption.split()[0]))
        assert ranked[0].frame == "red" and ranked[-1].frame == "green"
        assert not any(cell.frame for cell in ranked[1:-1])
    continues = [sum("continues" in cell.caption for cell in row) for row in rows]
    assert continues == [1, 0]
    assert "scored at 0" in labels[-1] and "gap" in labels[0]


def test_a_judge_of_latents_scores_the_noisy_ones_of_the_same_pictures(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(rollout_picture, "grid", lambda rows, *labels, side: (rows, *labels))
    drawn = []
    for name, stop_at in (("models", 0), ("lrm", 0), ("lrm", 3)):
        config = load_config(f"tests/data/random_{name}.py")
        config.sample.num_steps, config.sample.branch_from, config.eval_interval = 4, 2, 0
        config.sample.stop_at, config.sample.decode_batch_size = stop_at, 3
        drawn.append(rollout_picture.draw_rollout(read_recipe(config), "a fox", "", seed=0))
    (images, _, scored_images), (latents, _, scored_latents), (first, *_) = drawn
    assert len(latents) == 2 and len(first) == 1
    for one, other in zip(images, latents, strict=True):
        assert [cell.image.tobytes() for cell in one] == [cell.image.tobytes() for cell in other]
        assert [cell.caption for cell in one] != [cell.caption for cell in other]
    assert "from t = 251\nscored at 1\n" in scored_images[0]
    assert "from t = 251\nscored at 251\n" in scored_latents[0]
    assert "from t = 1\nscored at 1\n" in scored_latents[1]


@pytest.mark.slow
def test_the_script_writes_under_runs_and_names_the_colours(tmp_path):
    for name in ("assets", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    config = ["--config=tests/data/random_models.py", "--config.sample.num_steps=4"]
    command = [sys.executable, ROOT / "scripts" / "show_rollout.py", "--prompt=a fox", *config]
    result = subprocess.run(
        [*command, "--config.sample.branch_from=2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "framed green: the highest score, red: the lowest" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets", "runs", "tests"]
    assert (tmp_path / "runs" / "rollout.png").is_file()
