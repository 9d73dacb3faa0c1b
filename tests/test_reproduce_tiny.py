"""The arms of the tables, and their arithmetic."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from spo.command_line.config_files import leaves, load_config
from spo.costs.benchmark import Work
from spo.errors import UserError
from spo.method.build import read_recipe
from spo.run.checkpoint_folder import write_state
from spo.tiny_world import curves, reproduce, verdicts


@pytest.mark.parametrize("arm", reproduce.ARMS)
def test_an_arm_changes_what_its_name_says(arm):
    config = reproduce.arm_config(arm, seed=3, folder=Path("out/arm/seed_3"))
    read_recipe(config)
    tiny = load_config(reproduce.CONFIGS.get(arm, "config/tiny.py"))
    ours, theirs = leaves(config), leaves(tiny)
    changed = {key for key in ours if ours[key] != theirs.get(key)}
    common = {"seed", "logdir", "run_name", "resume_from", "eval_interval", "prompts.num"}
    expected = {
        "GradSPO": set(),
        **dict.fromkeys(reproduce.CONFIGS, set()),
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
    else:
        assert len(changed) > len(common)
    assert common <= changed
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


def test_the_arms_on_the_lrm_are_gradspo_and_lpo_at_all_timesteps():
    recipes = {arm: read_recipe(load_config(file)) for arm, file in reproduce.CONFIGS.items()}
    lpo, gradspo = recipes["LPO"], recipes["GradSPO on the LRM"]
    assert (lpo.loss.beta, lpo.loss.uses_ema) == (500, False)
    assert (gradspo.loss.beta, gradspo.loss.uses_ema) == (10, True)
    for recipe in recipes.values():
        rollout = recipe.collect.rollout
        assert (rollout.branch_from, rollout.num_candidates, rollout.looks_at) == (0, 4, "latents")


def test_a_curve_has_the_costs_up_to_each_checkpoint(tmp_path, monkeypatch):
    def train(config):
        run = Path(config.logdir, config.run_name)
        lines = [
            {"pairs": 10 * n, "seconds_rollout": 2.0, "seconds_train": n} for n in (1, 2, 3, 4)
        ]
        for rollouts in (2, 4):
            folder = run / "checkpoints" / f"epoch_0000_rollout_{rollouts:06d}"
            folder.mkdir(parents=True)
            write_state(folder, {"position": {"rollouts": rollouts}})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def compare(base, quality):
        gains = {"difference": quality - base, "faithfulness": 0.0}
        return SimpleNamespace(**{k: SimpleNamespace(mean=v) for k, v in gains.items()})

    gains = {"epoch_0000_rollout_000002": 0.4, "epoch_0000_rollout_000004": 0.9}
    bench = SimpleNamespace(base=0.0, score=lambda folder: gains[folder.name])
    monkeypatch.setattr(curves, "train", train)
    monkeypatch.setattr(curves, "bench", lambda: bench)
    monkeypatch.setattr(curves, "compare", compare)
    for _ in range(2):  # the second time it is read
        run = curves.run_curve("SPO", 1, tmp_path)
        monkeypatch.setattr(curves, "train", None)
    # A rollout of 8 prompts costs 8 TFLOP and 2 s, the training on a pair 0.1 of both.
    work = Work({"rollout": 2e12, "training": 1e12}, prompts=2, pairs=10)
    wanted = {
        "rollouts": [0, 2, 4],
        "tflop": pytest.approx([0, 16 + 3, 32 + 10]),
        "seconds": pytest.approx([0, 4 + 3, 8 + 10]),
        "quality": [0, 0.4, 0.9],
        "faithful": [0, 0, 0],
    }
    slow = run | {"seconds_rollout": [9.0] * 4}
    assert curves.with_costs([run, slow], work) == [wanted, wanted]


def test_gains_and_costs_are_read_off_curves(tmp_path):
    costs = {"rollouts": [0, 2, 4], "tflop": [0, 10, 20], "seconds": [0, 5, 15]}
    curve = costs | {"faithful": [0, 0.02, -0.02]}
    rising, falling = ({**curve, "quality": gains} for gains in ([0, 0.8, 1.2], [0, 1.6, 0.8]))
    found = curves.read_off(rising, {"rollouts": 3, "tflop": 5, "seconds": 20})
    nan = float("nan")
    wanted = {"quality_rollouts": 1.0, "quality_tflop": 0.4, "quality_seconds": nan}
    wanted |= {"faithful_rollouts": 0, "faithful_tflop": 0.01, "faithful_seconds": nan}
    wanted |= {"until_rollouts": 3, "until_tflop": 15, "until_seconds": 10}
    assert found == pytest.approx(wanted, nan_ok=True)
    found = curves.read_off(falling, {"tflop": 20})
    wanted = {"quality_tflop": 0.8, "faithful_tflop": -0.02, "until_tflop": 6.25}
    assert found == pytest.approx(wanted)
    rows = {"LPO": reproduce.summarise([curves.read_off(rising, dict.fromkeys(costs, 3))] * 2)}
    table = curves.as_table(rows, dict.fromkeys(costs, 3)).splitlines()
    wanted = "+1.00 ± 0.00 | +0.24 ± 0.00 | +0.48 ± 0.00 | 3.0 ± 0.0 | 15.0 ± 0.0 | 10.0 ± 0.0"
    assert " ".join(table[2].split()) == f"| LPO | {wanted} | +1.2 ± 0.0 |"
    curves.draw({"LPO": [rising, falling]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_a_verdict_beside_the_hidden_quality():
    statuses = ["healthy", "healthy", "over-optimised", "worse than untrained"]
    measured = {"quality": [0.0, 1.0, 1.9, 2.0, -1.0], "verdicts": statuses, "ship": 2}
    expected = ("+1.00 +1.90 +2.00 -1.00", 3, 3, 2, "95 %", "2 of 4")
    assert verdicts._cells(measured) == expected
    never = {"quality": [0.0, -1.0], "verdicts": ["cannot tell"], "ship": 0}
    assert verdicts._cells(never) == ("-1.00", 0, "never", 0, "", "0 of 1")


@pytest.mark.parametrize("name", verdicts.RUNS)
def test_runs_with_verdicts_are_read(name, tmp_path, monkeypatch):
    configs = []
    monkeypatch.setattr(verdicts, "train", lambda config: configs.append(config))
    with pytest.raises(UserError, match="metrics.jsonl is missing"):
        verdicts.run(name, 1, tmp_path)
    recipe = read_recipe(configs[0])
    assert recipe.validation.num_judged == 64 and recipe.run.checkpoint_limit == 0
