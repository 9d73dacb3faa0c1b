"""What a run's config leads to expect of its numbers, and which check finds what went wrong."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spo.command_line.config_files import leaves
from spo.errors import UserError
from spo.guard.checks import CHECKS, check, describe
from spo.guard.expected import LOOK, ema_bounds, ends, estimate, loss_bounds
from spo.guard.log import open_log
from spo.method.build import read_recipe
from spo.method.learner import distance, update_ema
from spo.method.losses import preference_loss
from spo.tiny_world import healthy
from spo.tiny_world.preferences import Darkness

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "check_run.py"
GOOD = {
    "loss": lambda i: 0.688 + 0.001 * (-1) ** i,
    "win_ratio": lambda i: 1.002,
    "lose_ratio": lambda i: 1.001,
    "clipped": lambda i: 0.0,
    "score_mean": lambda i: 20 + 0.2 * i + 0.1 * (-1) ** i,
    "win_margin": lambda i: 0.4,
    "comparisons": lambda i: 640,
    "pairs": lambda i: 500,
    "pairs_at": lambda i: {"751": 20, "1": 0, "501": 480},
    "grad_norm": lambda i: 0.07,
    "updates": lambda i: 13,
    "skipped_updates": lambda i: 0,
    "ema_distance": lambda i: 0.001,
    "lora_norm": lambda i: 0.03,
    "kl_at": lambda i: {"751": 0.1, "501": 0.3},
}
# Seen in runs of the tiny world: what else is off, and the checks that must say so.
BAD = {
    "good": ({}, set()),
    "starved": (
        {
            "pairs": lambda i: 20,
            "pairs_at": lambda i: {"751": 20, "1": 0, "501": 0},
            "win_margin": lambda i: 0.12,
        },
        {"pairs", "win margin"},
    ),
    "fewer pairs than an update": ({"pairs": lambda i: 39, "comparisons": lambda i: 64}, {"pairs"}),
    "collapsed": (
        {
            "loss": lambda i: math.log(2),
            "win_ratio": lambda i: 1.1,
            "lose_ratio": lambda i: 1.1,
            "clipped": lambda i: min(1, i / 10),
            "grad_norm": lambda i: 0.0,
            "ema_distance": lambda i: 1e-6,
            "lora_norm": lambda i: 0.24,
            "score_mean": lambda i: 20 - 0.2 * i + 0.1 * (-1) ** i,
        },
        {
            *("clipped share", "gradient norm", "ratios", "loss - ln 2", "mean score"),
            *("EMA distance", "LoRA norm"),
        },
    ),
    "rate too high": (
        {
            "win_ratio": lambda i: 0.981,
            "lose_ratio": lambda i: 0.980,
            "grad_norm": lambda i: 0.07 * (1 + i),
        },
        {"ratios", "gradient norm"},
    ),
    # In units of learning_rate sqrt(weights) = 5e-4 these are 0.6 and 10: below 0.73, above 9.
    "policy stands still": ({"ema_distance": lambda i: 0.0003}, {"EMA distance"}),
    "EMA far behind": ({"ema_distance": lambda i: 0.005}, {"EMA distance"}),
    "flipped": (
        {"loss": lambda i: math.log(2) + 5e-4 * (-1) ** i, "score_mean": lambda i: 20 + (-1) ** i},
        {"loss - ln 2"},
    ),
    "all labels turned round": ({"loss": lambda i: 0.7 + 0.001 * (-1) ** i}, {"loss - ln 2"}),
    "another loss": ({"loss": lambda i: 0.12}, {"loss"}),
    "fp16 overflows": ({"skipped_updates": lambda i: 1}, {"skipped updates"}),
    "not a number": ({"score_mean": lambda i: math.nan if i == 9 else 20 + i}, {"finite numbers"}),
}


def make_run(folder, changes=None, rollouts=20, lora=True, **config):
    """Writes a run directory of two epochs, with 1,000,000 LoRA weights."""
    folder.mkdir()
    values = {**GOOD, **(changes or {})}
    half = -(-rollouts // 2)
    lines = [
        {"rollout": i + 1, "epoch": 1 + i // half, "step": 13 * (i + 1)}
        | {name: value(i) for name, value in values.items()}
        for i in range(rollouts)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {"sample": {"threshold": 0.3}, "train": {"global_batch_size": 40, "learning_rate": 5e-7}}
    (folder / "config.json").write_text(json.dumps(own | config))
    if lora:
        save_file({"a": torch.zeros(1000, 1000)}, folder / "pytorch_lora_weights.safetensors")
    return folder


def looks(folder):
    return {row.name for row in check(open_log(folder)) if row.state == LOOK}


def states(folder):
    return {row.name: row.state for row in check(open_log(folder))}


def test_bounds_of_the_loss():
    # 10 log(1.1 / 0.9) = 2.006707; log(1 + e^-2.006707) = 0.126131
    low, high = loss_bounds(10, 0.1)
    assert (low, high) == (pytest.approx(0.126131, abs=1e-6), pytest.approx(2.132838, abs=1e-6))
    # The loss itself, both ratios far past the clips.
    far = torch.tensor([9.0]), torch.tensor([0.0]), torch.tensor([-9.0]), torch.tensor([0.0])
    assert preference_loss(*far, 10, 0.1).loss.item() == pytest.approx(low, abs=1e-6)
    assert preference_loss(*far[2:], *far[:2], 10, 0.1).loss.item() == pytest.approx(high, abs=1e-6)
    assert loss_bounds(10, None) == (0, math.inf)
    low, high = loss_bounds(500, 0.1)  # LPO's beta
    assert low < 1e-40 and high == pytest.approx(100.3353, abs=1e-4)


@pytest.mark.parametrize(("gradient", "bound"), [("noise", 0), ("constant", 1)])
def test_bounds_of_the_ema_distance(gradient, bound):
    assert ema_bounds(0.9, 0.9) == (pytest.approx(1.4620, abs=1e-4), pytest.approx(9))
    generator = torch.Generator().manual_seed(0)
    policy = {"a": torch.nn.Parameter(torch.zeros(5000))}
    ema = {"a": torch.zeros(5000)}
    optimizer = torch.optim.AdamW(policy.values(), lr=1e-3, weight_decay=0, betas=(0.9, 0.999))
    for _ in range(200):
        noise = torch.randn(5000, generator=generator)
        policy["a"].grad = noise if gradient == "noise" else torch.ones(5000)
        optimizer.step()
        update_ema(ema, policy, 0.9)
    found = distance(ema, policy).item() / (1e-3 * 5000**0.5)
    assert found == pytest.approx(ema_bounds(0.9, 0.9)[bound], rel=0.03)


def test_ends_and_their_error():
    first, last = ends(list(range(200)))
    assert first == list(range(20)) and last == list(range(180, 200))
    assert [len(ends(list(range(n)))[1]) for n in (1, 2, 12, 16, 50)] == [1, 1, 6, 8, 8]
    found = estimate(
        [1.0, 3.0, 5.0, 7.0]
    )  # standard deviation sqrt(20 / 3), of the mean half of it
    assert (found.mean, found.error) == (4, pytest.approx(3 * math.sqrt(20 / 3) / 2))
    assert found.sign == 1 and estimate([1.0, -1.0]).sign == 0 and estimate([9.0]).sign == 0


@pytest.mark.parametrize("kind", BAD)
def test_each_fault_is_found_by_its_check(tmp_path, kind):
    changes, expected = BAD[kind]
    assert looks(make_run(tmp_path / "run", changes)) == expected
    assert set(states(tmp_path / "run")) == set(CHECKS)


def test_labels_are_blamed_neither_in_the_first_epoch_nor_by_few_pairs(tmp_path):
    flipped = BAD["flipped"][0]
    early = make_run(tmp_path / "early", {**flipped, "epoch": lambda i: 1})
    few = {**flipped, "loss": lambda i: math.log(2) + 0.01 * (-1) ** i}
    for folder in (early, make_run(tmp_path / "few", few)):
        assert states(folder)["loss - ln 2"] == "cannot tell"


def test_bounds_follow_from_the_config_of_the_run(tmp_path):
    for name, train in {"low": {"beta": 10.0}, "high": {"beta": 500.0}}.items():
        folder = make_run(tmp_path / name, {"loss": lambda i: 0.1}, train=train)
        assert ("loss" in looks(folder)) is (name == "low")
    own = make_run(tmp_path / "own", {"loss": lambda i: 9.0}, algorithm="my_loss:Smoothed")
    assert "loss" not in states(own) and "loss - ln 2" not in states(own)
    schedule = {"threshold": None, "threshold_min": 0.35, "threshold_max": 0.5}
    assert states(make_run(tmp_path / "lpo", sample=schedule))["win margin"] == "ok"
    schedule["threshold_min"] = 0.85
    assert looks(make_run(tmp_path / "high_lpo", sample=schedule)) == {"win margin"}


def test_a_run_in_progress(tmp_path):
    folder = make_run(tmp_path / "run", rollouts=1, lora=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"rollout": 2, "loss": 0.6')  # being written
    found = states(folder)
    assert LOOK not in found.values()
    assert {"mean score", "EMA distance"} == set(CHECKS) - set(found)
    assert found["loss - ln 2"] == "cannot tell"
    text = describe(open_log(folder / "metrics.jsonl"))
    assert text.endswith("not checked, as the numbers are not there: mean score, EMA distance")
    # A starved run that has made no pair yet has no loss either.
    none = {"loss": lambda i: None, "grad_norm": lambda i: None, "pairs": lambda i: 0}
    assert looks(make_run(tmp_path / "starved", none)) == {"pairs"}


def test_the_verdict_of_the_run_is_repeated(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "No number of the training tells a wrong preference model" in describe(open_log(folder))
    for verdict, state in (("healthy", "ok"), ("over-optimised", LOOK), ("cannot tell",) * 2):
        line = {"evaluation": 2, "epoch": 2, "rollout": 20, "step": 9, "verdict": verdict}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line | {"text": f"epoch 2: {verdict}; ship epoch 1"}) + "\n")
        assert states(folder)["verdict"] == state
        assert f"epoch 2: {verdict}; ship epoch 1" in describe(open_log(folder))


def test_at_most_three_sentences_and_causes_first(tmp_path):
    text = describe(open_log(make_run(tmp_path / "run", BAD["collapsed"][0])))
    advice = text.partition("look at first: ")[2]
    assert advice.startswith("The policy has moved to the clips") and "before rollout 3," in advice
    assert advice.count(". ") == 2 and "No gradient is left" in advice


CSV = """"Step","sweet-run-7 - train/loss","sweet-run-7 - train/loss__MIN","sweet-run-7 - ratio_win"
"0","0.6931","0.1","1.0"
"1","NaN","0.1",""
"2","0.6925","0.1","1.001"
"""


def test_numbers_of_the_official_code(tmp_path):
    (tmp_path / "export.csv").write_text(CSV)
    log = open_log(tmp_path / "export.csv")
    assert log.numbers("loss") == [0.6931, 0.6925]
    assert looks(tmp_path / "export.csv") == {"finite numbers"}
    assert log.numbers("win_ratio") == [1, 1.001] and log.settings.threshold == 0.3
    rows = [{"loss": 0.69, "_step": 3, "ratio_win": 1.01, "ratio_lose": 1.0, "lr": "x"}] * 2
    (tmp_path / "export.json").write_text(json.dumps(rows))
    (tmp_path / "export.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"l')
    for name in ("export.json", "export.jsonl"):
        assert set(states(tmp_path / name)) == {"finite numbers", "ratios", "loss", "loss - ln 2"}
        text = describe(open_log(tmp_path / name, "config/sdxl.py"))
        assert "not checked, as the numbers are not there: skipped updates, clipped" in text
    assert open_log(tmp_path / "export.json", "config/sdxl.py").settings.threshold == 0.4


UNREADABLE = {
    "nothing there": (None, "", "no run directory or file"),
    "empty run": ("run/metrics.jsonl", "", "missing or empty"),
    "damaged line": ("run/metrics.jsonl", '{"rollout": 1}\n{"ro\n', "line 2: not JSON"),
    "no object": ("run/metrics.jsonl", "[1]\n", "a line is no JSON object"),
    "no config": ("run/metrics.jsonl", '{"rollout": 1}\n', "config.json: cannot be read"),
    "preference model": ("run/metrics.jsonl", '{"step": 1, "accuracy": 1}\n', "preference model"),
    "another kind of file": (
        "run.txt",
        "loss",
        "known are run directories, and .jsonl, .json, .csv",
    ),
    "broken csv": ("run.csv", '"Step","loss\n1', "not a table of numbers|has none of"),
    "no list": ("run.json", "5", "not a table of numbers"),
    "list of numbers": ("run.json", "[5]", "not a table of numbers"),
    "other columns": ("run.csv", "Step,hello\n1,2\n", "has none of .*there: Step, hello"),
    "two runs": ("run.csv", "Step,a - loss,b - loss\n1,2,3\n", "both 'a - loss' and 'b - loss'"),
    "bytes": ("run.csv", b"\xff\xfe\x00", "not a table of numbers"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_input_is_one_line(tmp_path, kind):
    name, content, message = UNREADABLE[kind]
    path = tmp_path / (name or "nowhere")
    path.parent.mkdir(exist_ok=True)
    if name is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_log(path.parent if path.parent.name == "run" else path)


def script(monkeypatch, capsys, *arguments):
    """Runs check_run.py; returns its exit status, output and error."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def test_the_script_informs(tmp_path, monkeypatch, capsys):
    bad = make_run(tmp_path / "run", BAD["starved"][0])
    status, output, _ = script(monkeypatch, capsys, bad)
    assert status == 0 and "| pairs " in output
    assert "look at first: Too few comparisons make a pair" in output
    status, output, error = script(monkeypatch, capsys, tmp_path / "nowhere")
    assert status == 2 and not output and error.count("\n") == 1 and "nowhere" in error
    status, output, _ = script(monkeypatch, capsys, "--help")
    assert status == 0 and "docs/healthy_runs.md" in output


def test_what_the_runs_of_the_page_change():
    configs = [healthy.run_config(name, 0, Path("out/run")) for name in healthy.RUNS]
    for config in configs:
        read_recipe(config)
    good, *others = map(leaves, configs)
    changed = [{key for key in other if other[key] != good.get(key)} for other in others]
    assert changed[:2] == [{"sample.threshold"}, {"train.learning_rate"}]
    assert changed[3] == {"preference.scorer"} < changed[2]
    assert changed[2] >= {"preference.kwargs.seed"}


def test_darkness_prefers_dark_images():
    images = torch.stack([torch.full((3, 4, 4), value) for value in (-1.0, 0.0, 1.5)])
    scorer = Darkness(torch.device("cpu"))
    features = scorer.encode_prompts(["a", "b", "c"])
    assert scorer.score(images, features, 501).tolist() == [10, 0, -10]


def test_the_table_and_the_picture_of_the_five_runs(tmp_path, monkeypatch):
    def run_all(make, names, seeds, out, processes):
        out.mkdir()
        for name in names:
            folder = healthy.run_dir(out, name, 0)
            folder.parent.mkdir()
            make_run(folder, BAD.get(name, BAD["good"])[0])
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(
                    json.dumps({"evaluation": 2, "verdict": "healthy", "text": "fine"}) + "\n"
                )
        return {name: [{"quality": 1.0, "faithful": -0.1}] for name in names}

    monkeypatch.setattr(healthy, "run_all", run_all)
    rows = healthy.show_runs(tmp_path, 1).splitlines()
    assert " ".join(rows[2].split()) == "| good | +1.00 | -10.0 | nothing | healthy |"
    assert " ".join(rows[3].split()) == "| starved | +1.00 | -10.0 | pairs, win margin | healthy |"
    assert (tmp_path / "healthy_runs.png").stat().st_size > 20_000
