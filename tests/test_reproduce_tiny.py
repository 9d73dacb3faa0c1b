"""The arms of the table, and its arithmetic."""

from pathlib import Path

import pytest

from spo.command_line.config_files import leaves, load_config
from spo.method.build import read_recipe
from spo.tiny_world import reproduce


@pytest.mark.parametrize("arm", reproduce.ARMS)
def test_an_arm_changes_what_its_name_says(arm):
    config = reproduce.arm_config(arm, seed=3, folder=Path("out/arm/seed_3"))
    read_recipe(config)
    tiny = load_config("config/tiny.py")
    ours, theirs = leaves(config), leaves(tiny)
    changed = {key for key in ours if ours[key] != theirs.get(key)}
    common = {"seed", "logdir", "run_name", "resume_from", "eval_interval", "prompts.num"}
    expected = {
        "GradSPO": set(),
        "SPO": {"algorithm"},
        "tiny decoder": {"sample.decoder"},
        "predictions of the rollout": {"train.ema_prediction"},
        "no clips, no EMA pass": {"train.ema_prediction", "train.clip_eps"},
        "official": {
            "train.max_grad_norm",
            "train.ema_every",
            "sample.keep_all_final",
            "sample.final_score_timestep",
        },
    }
    if arm in expected:
        assert changed == common | expected[arm]
    assert common <= changed and (len(changed) > len(common)) == (arm != "GradSPO")
    assert config.seed == 3 and Path(config.logdir, config.run_name) == Path("out/arm/seed_3")


def test_every_quick_arm_is_an_arm():
    assert set(reproduce.QUICK) < set(reproduce.ARMS)


def test_means_and_intervals_over_seeds():
    measures = ("quality", "win_rate", "faithful", "updates")
    results = [dict.fromkeys(measures, value) for value in (1.0, 2.0, 3.0)]
    row = reproduce.summarise(results)
    assert row["quality"] == 2 and row["seeds"] == 3
    assert row["quality_interval"] == pytest.approx(4.303 / 3**0.5)
    table = reproduce.as_table({"GradSPO": row})
    row = " ".join(table.splitlines()[2].split())
    assert row == "| GradSPO | +2.00 ± 2.48 | 200.0 ± 248.4 | +200.0 ± 248.4 | 2 |"
