"""The picture of a rollout: frames, scores and the candidate that continues."""

from pathlib import Path

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
