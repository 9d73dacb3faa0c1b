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
