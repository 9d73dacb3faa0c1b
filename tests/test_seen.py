"""Prompts that a compared model was trained on: found by its run, and given apart in every table."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from helpers import model_folder
from test_evaluate import changed, config, folder_of, write_lora  # noqa: F401 (a fixture)
from test_report import make_results, read

from spo.data.prompts import read_prompts
from spo.errors import UserError
from spo.evaluation.evaluator import evaluate
from spo.evaluation.report import write_report
from spo.evaluation.results import read_results, summarize, summary_table, write_results
from spo.evaluation.seen import training_of
from spo.lora_io.model_spec import ModelSpec
from spo.models.loading import ModelSource
from spo.run.checkpoint_folder import link_best, new_checkpoint, write_state

BASE = ModelSource(model_folder("sd15"))
PROMPTS = ("a fox", "a bear", "a whale", "a house")
LORA = "pytorch_lora_weights.safetensors"


def make_run(folder, prompts, lora=LORA, changes=None, starts=(), **section):
    """A run directory as far as its training prompts go; returns its LoRA's path, without a LoRA."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}.txt"
    if prompts is not None:
        source.write_text("".join(f"{prompt}\n" for prompt in prompts))
    section = {"source": str(source), "split": "train", "column": "caption", "num": 0} | section
    (folder / "config.json").write_text(json.dumps({"prompts": section} | (changes or {})))
    (folder / "starts.jsonl").write_text("".join(f"{json.dumps(start)}\n" for start in starts))
    return folder / lora


def training(*loras, prompts=PROMPTS):
    spec = ModelSpec("lora", "lora", BASE, tuple((path, 1.0) for path in loras))
    return training_of(spec, BASE, prompts)


# ---- the list of a run ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora", [LORA, f"ema/{LORA}", f"checkpoints/e_1/{LORA}", f"checkpoints/e_1/ema/{LORA}"]
)
def test_the_config_of_the_run_names_the_list(tmp_path, lora):
    found = training(make_run(tmp_path / "run", ["a fox", "another", " a whale "], lora))
    assert found.seen == {"a fox", "a whale"} and not found.fault
    assert found.sources == ("run.txt",)  # no path of this machine


def test_prompts_are_compared_exactly_after_strip(tmp_path):
    lora = make_run(tmp_path / "run", ["a fox ", "A bear", "a whale.", "a  house"])
    assert training(lora, prompts=(" a fox", *PROMPTS[1:])).seen == {"a fox"}


def test_the_draw_is_that_of_the_training(tmp_path):
    many = [f"prompt {i}" for i in range(50)]
    lora = make_run(tmp_path / "run", many, num=10, seed=7)
    drawn = read_prompts(str(tmp_path / "run.txt"), num=10, seed=7).prompts
    assert training(lora, prompts=many).seen == set(drawn)


def test_lists_of_several_loras_and_of_runs_before_are_joined(tmp_path):
    first = make_run(tmp_path / "first", ["a fox"])
    first.touch()
    make_run(tmp_path / "second", ["a bear"], changes={"lora": {"init_from": str(first)}})
    before = {"prompts": "1 prompts from x (1 rows)"}
    of_other = before | {"resumed_from": str(tmp_path / "second" / "checkpoints" / "epoch_0001")}
    own = before | {"resumed_from": "elsewhere/third/checkpoints/epoch_0001"}  # moved since
    starts = (of_other, own)
    third = make_run(tmp_path / "third", ["a whale"], starts=starts)
    found = training(third)
    assert found.seen == {"a fox", "a bear", "a whale"} and not found.fault
    assert found.sources == ("third.txt", "second.txt", "first.txt")
    assert training(first, make_run(tmp_path / "fourth", ["a house"])).seen == {"a fox", "a house"}


def test_a_run_that_began_with_itself_ends(tmp_path):
    lora = make_run(
        tmp_path / "run", ["a fox"], changes={"lora": {"init_from": str(tmp_path / "run")}}
    )
    lora.touch()
    assert training(lora).seen == {"a fox"}


def test_a_file_of_another_name_is_unknown(tmp_path):
    lora = make_run(tmp_path / "run", ["a fox"])
    assert (
        training(lora.with_name("other.safetensors")).fault == "its file is not the LoRA of a run"
    )


def test_the_base_model_is_no_run(tmp_path):
    base = ModelSpec("base", "base", BASE)
    found = training_of(base, BASE, PROMPTS)
    assert (found.sources, found.seen, found.fault) == ((), frozenset(), "")
    others = (
        ModelSpec("unet", "x", replace(BASE, unet="x")),
        ModelSpec("pipeline", "x", ModelSource("x")),
        ModelSpec("images", "x", None, images=tmp_path),
    )
    assert all(training_of(spec, BASE, PROMPTS).fault for spec in others)


def state(run_dir, name, prompts_of):
    with new_checkpoint(run_dir, name, limit=0) as folder:
        write_state(folder, {"prompts_sha256": read_prompts(str(prompts_of)).digest()})


def test_a_list_that_is_not_that_of_the_training_is_unknown(tmp_path):
    lora, file = make_run(tmp_path / "run", ["a fox"]), tmp_path / "run.txt"
    state(tmp_path / "run", "epoch_0001", file)
    assert training(lora).seen == {"a fox"} and not training(lora).fault
    file.write_text("a bear\n")  # the file was edited since
    assert "run.txt, are not those, or not all" in training(lora).fault
    assert not training(lora).seen
    state(tmp_path / "run", "epoch_0002", file)  # the run went on with the edited list
    assert training(lora).fault
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch_0001")
    assert training(lora).seen == {"a bear"}
    (tmp_path / "run" / "checkpoints" / "epoch_0002" / "training_state.json").write_text("{")
    assert training(lora).fault


def test_a_run_that_went_on_with_another_list_is_unknown(tmp_path):
    starts = [{"prompts": f"1 prompts from {source} (1 rows)"} for source in ("x.txt", "y.txt")]
    assert training(make_run(tmp_path / "run", ["a fox"], starts=starts)).fault
    starts[1] = {"prompts": "1 prompts from x.txt, as drawn before in /home/x.json (9 rows)"}
    assert not training(make_run(tmp_path / "run", ["a fox"], starts=starts)).fault


BAD = {
    "no config": lambda run: (run / "config.json").unlink(),
    "damaged": lambda run: (run / "config.json").write_text("{"),
    "an evaluation's": lambda run: (run / "config.json").write_text(
        json.dumps({"prompts": {"source": str(run.parent / "run.txt")}, "scorers": []})
    ),
    "of something else": lambda run: (run / "config.json").write_text("[]"),
    "without prompts": lambda run: (run / "config.json").write_text('{"lora": {}}'),
    "prompts of another kind": lambda run: (run / "config.json").write_text('{"prompts": 3}'),
    "no text": lambda run: (run / "config.json").write_text('{"prompts": {"source": 3}}'),
    "no number": lambda run: (run / "config.json").write_text(
        json.dumps({"prompts": {"source": str(run.parent / "run.txt"), "num": "all"}})
    ),
    "no list": lambda run: (run.parent / "run.txt").unlink(),
    "damaged starts": lambda run: (run / "starts.jsonl").write_text("{\n"),
}


@pytest.mark.parametrize("harm", BAD.values(), ids=BAD.keys())
def test_a_list_that_cannot_be_read_is_unknown(tmp_path, harm):
    lora, good = make_run(tmp_path / "run", ["a fox"]), make_run(tmp_path / "good", ["a bear"])
    harm(tmp_path / "run")
    found = training(lora)
    assert found.fault and "\n" not in found.fault and not found.seen
    both = training(lora, good)  # what is known stays known
    assert both.fault and both.seen == {"a bear"}


def cached(tmp_path, source):
    """A LoRA in the Hub's cache, with the published config of its run beside it."""
    folder = tmp_path / "models--user--some-repo" / "snapshots" / "abc123" / "sd1_5"
    return make_run(folder, None, source=source)


def test_a_published_run_names_its_list_by_the_config_beside_it(tmp_path, monkeypatch):
    from spo.evaluation import seen

    asked, own = [], tmp_path / "mine.txt"
    own.write_text("a fox")

    def resolve(spec, key, revision):
        asked.append((spec, revision))
        return tmp_path / "models--user--some-repo/snapshots/abc123/sd1_5/config.json"

    monkeypatch.setattr(seen, "resolve_file", resolve)
    monkeypatch.setattr(seen, "read_prompts", lambda **section: read_prompts(str(own)))
    found = training(cached(tmp_path, "user/prompts"))
    assert not found.fault and found.sources == ("user/prompts",) and found.seen == {"a fox"}
    assert asked == [("hf://user/some-repo/sd1_5/config.json", "abc123")]
    # A file of the training's machine, which has the name of one here.
    monkeypatch.chdir(tmp_path)
    found = training(cached(tmp_path, "mine.txt"))
    assert "mine.txt, are a file of another machine" in found.fault and not found.seen


# ---- tables --------------------------------------------------------------------------------------

SCORES = {"base": (1.0, 2.0, 3.0, 4.0), "lora": (2.0, 1.0, 7.0, 4.0), "spo": (1.0, 2.0, 3.0, 9.0)}


def seen_results(folder, marks, **models):
    """Results of four prompts; `marks` are the models that have seen each."""
    scores = {name: {"quality": values} for name, values in SCORES.items()}
    results = make_results(folder, scores, list(PROMPTS))
    rows = zip(results.prompts, marks, strict=True)
    changed_models = (replace(m, **models.get(m.name, {})) for m in results.models)
    prompts = tuple(replace(row, seen=list(mark)) for row, mark in rows)
    return replace(results, prompts=prompts, models=tuple(changed_models))


KNOWN = {"lora": {"trained_on": ["4k.json"]}, "spo": {"trained_on": ["x.txt", "y.txt"]}}
MARKS = ((), ("lora", "spo"), ("lora",), ())


def test_means_differences_and_win_rates_of_all_unseen_and_seen(tmp_path):
    rows = summarize(seen_results(tmp_path, MARKS, **KNOWN))
    found = {
        (row.prompts, row.model): (
            row.n,
            row.mean.mean,
            row.difference and row.difference.mean,
            row.win_rate and row.win_rate.mean,
            row.ties,
        )
        for row in rows
    }
    assert found == {
        ("all", "base"): (4, 2.5, None, None, None),
        ("all", "lora"): (4, 3.5, 1.0, (1 + 0 + 1 + 0.5) / 4, 1),
        ("all", "spo"): (4, 3.75, 1.25, (0.5 * 3 + 1) / 4, 3),
        ("unseen", "base"): (2, 2.5, None, None, None),  # a fox, a house
        ("unseen", "lora"): (2, 3.0, 0.5, 0.75, 1),
        ("unseen", "spo"): (2, 5.0, 2.5, 0.75, 1),
        ("seen", "base"): (2, 2.5, None, None, None),  # a bear, a whale
        ("seen", "lora"): (2, 4.0, 1.5, 0.5, 0),
        ("seen", "spo"): (2, 2.5, 0.0, 0.5, 2),
    }
    assert [row.prompts for row in rows] == ["all"] * 3 + ["unseen"] * 3 + ["seen"] * 3
    interval = {(row.prompts, row.model): row.difference for row in rows}["seen", "lora"]
    assert (interval.low, interval.high) == (-1.0, 4.0)  # of the differences -1 and 4


SEEN = (
    "2 of 4 prompts were trained on, word for word: 2 by lora (4k.json), 1 by spo (x.txt + y.txt)."
)


def test_every_table_has_the_parts_and_one_line(tmp_path):
    results = seen_results(tmp_path, MARKS, **KNOWN)
    table = summary_table(results)
    lines = table.splitlines()
    assert lines[0].split(" | ")[:3] == ["| scorer ", "prompts", "model"]
    assert len([line for line in lines if line.startswith("| Quality | seen ")]) == 3
    assert lines[-1] == SEEN and lines[-2] == ""
    write_results(results, tmp_path)
    assert read_results(tmp_path).prompts[1].seen == ["lora", "spo"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["prompts"] for row in written["summary"]][::3] == ["all", "unseen", "seen"]
    page = read(write_report(tmp_path, read_results(tmp_path)))
    assert page.all("th", scope="rowgroup") == ["Quality", "Quality, unseen", "Quality, seen"]
    assert SEEN in page.all("p")
    assert [row["seen"] for row in page.data()["prompts"]] == ["", "lora, spo", "lora", ""]
    assert len(page.all("svg")) == 3  # of all prompts


def test_without_a_seen_prompt_only_the_line_is_added(tmp_path):
    plain = make_results(tmp_path, {n: {"quality": v} for n, v in SCORES.items()}, list(PROMPTS))
    table = summary_table(plain)
    assert table.count("\n\n") == 0 and "prompts" not in table  # nothing is known: no line
    known = seen_results(tmp_path, [()] * 4, lora={"trained_on": ["4k.json"]})
    line = "0 of 4 prompts were trained on, word for word: 0 by lora (4k.json)."
    assert summary_table(known) == f"{table}\n\n{line}"


def test_unseen_is_not_claimed_where_a_list_is_unknown(tmp_path):
    models = KNOWN | {"spo": {"unknown_training": True}}
    results = seen_results(tmp_path, ((), ("lora",), (), ()), **models)
    assert {row.prompts for row in summarize(results)} == {"all", "unknown", "seen"}
    table = summary_table(results)
    assert "At least 1 of 4 prompts were trained on" in table and "unseen" not in table
    assert "could not be read: those of spo; which of these prompts were among them" in table
    alone = seen_results(tmp_path, [()] * 4, spo={"unknown_training": True})
    assert {row.prompts for row in summarize(alone)} == {"all"}
    assert "0 of 4" not in summary_table(alone) and "could not be read" in summary_table(alone)


def test_all_prompts_seen(tmp_path):
    results = seen_results(tmp_path, [("lora",)] * 4, **KNOWN)
    assert {row.prompts for row in summarize(results)} == {"all", "seen"}
    assert write_report(tmp_path, results).exists()


def test_results_from_before_are_read(tmp_path):
    plain = make_results(tmp_path, {n: {"quality": v} for n, v in SCORES.items()}, list(PROMPTS))
    write_results(plain, tmp_path)
    file = tmp_path / "results.json"
    content = json.loads(file.read_text())
    for model in content["models"]:
        del model["trained_on"], model["unknown_training"]
    for row in content["prompts"]:
        del row["seen"]
    for row in content["summary"]:
        del row["prompts"]
    file.write_text(json.dumps(content))
    assert summary_table(read_results(tmp_path)) == summary_table(plain)
    assert "trained on" not in write_report(tmp_path, read_results(tmp_path)).read_text()[-2000:]


# ---- a whole evaluation --------------------------------------------------------------------------


def test_an_evaluation_tells_seen_prompts(config, tmp_path, capsys):  # noqa: F811
    prompts = Path(config.prompts.source).read_text().splitlines()
    run = make_run(tmp_path / "one", [prompts[1], prompts[4], "another"])
    write_lora(run)
    bare = config.models[1].removeprefix("lora=")
    evaluate(changed(config, models=("base", f"run={run.parent}", f"bare={bare}")))
    out = capsys.readouterr().out
    assert "training prompts of bare: unknown (" in out
    assert "At least 2 of 6 prompts were trained on, word for word: 2 by run (one.txt)." in out
    results = read_results(folder_of(config))
    assert [row.seen for row in results.prompts] == [[], ["run"], [], [], ["run"], []]
    table = (folder_of(config) / "table.md").read_text()
    assert table.count("| seen ") == 3 and table in out
    # Without the bare file everything is known, and what was drawn and scored is taken as it is.
    evaluate(changed(config, models=("base", f"run={run.parent}")))
    assert "unseen" in (folder_of(config) / "table.md").read_text()


def test_a_run_trained_here_is_known_in_its_evaluation(tmp_path, monkeypatch):
    from spo.lora_io.model_spec import read_specs
    from tests.small_runs import ROOT, run

    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    run(folder, eval_interval=0)
    trained = read_prompts(**json.loads((folder / "config.json").read_text())["prompts"]).prompts
    assert len(trained) == 4
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    link_best(folder, newest)
    linked = folder / "best"
    for text in (folder, folder / "ema", newest, newest / "ema", linked, linked / "ema"):
        (spec,) = read_specs([f"x={text}"], BASE, "sd15", "models")
        found = training_of(spec, BASE, (*trained[:2], "another"))
        assert found.seen == set(trained[:2]) and not found.fault


def test_the_official_lists_if_they_are_here(monkeypatch, tmp_path):
    """57 of the 487 Pick-a-Pic v2 test prompts stand among the 4,000 official training prompts."""

    for module in (datasets.config, huggingface_hub.constants):  # this test downloads nothing
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    try:
        tested = read_prompts("pickapic_v2").prompts
        read_prompts("official-4k")
    except UserError:
        pytest.skip("the real lists are not in the cache")
    lora = make_run(tmp_path / "run", None, source="official-4k")
    found = training(lora, prompts=tested)
    assert (len(tested), len(found.seen), found.fault) == (487, 57, "")
