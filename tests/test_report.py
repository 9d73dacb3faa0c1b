"""report.html of evaluations and of runs: complete, self-contained, and safe whatever a prompt is."""

import base64
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageFont

from spo.errors import UserError
from spo.evaluation import figures as figures_of_pages
from spo.evaluation import health_figures, report
from spo.evaluation.image_sets import claim_prompts
from spo.evaluation.page import embedded_image
from spo.evaluation.report import chosen_prompts, write_report
from spo.evaluation.results import (
    ModelInfo,
    PromptResult,
    Results,
    ScoredImage,
    ScorerInfo,
    summarize,
    write_results,
)
from spo.evaluation.run_report import (
    TRAINING,
    _draw_heat,
    draw_curves,
    panels_of,
    write_run_report,
)
from spo.guard.log import evaluations
from spo.guard.verdict import Evaluation, decide
from spo.method import metrics
from spo.preference.pair_metrics import step_metrics, validation_metrics
from spo.run.folder import read_metrics, record_start
from spo.run.tracking import Tracking
from spo.types import Comparison

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "report.py"
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!-- <img src=x onerror=alert(1)> -->",
    "\"double\" and 'single' &amp; <b>",
    "a 🦊 and a ثعلب",
    "two\nlines\u2028and a tab\t",
)
HALF_A_CHARACTER = "\ud83e"  # what a json file can hold, and UTF-8 cannot
TIMESTEPS_OF_RUN = (751, 501, 251, 1)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")


class Page(HTMLParser):
    """Elements, the text in each kind of them, and what should be nowhere."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.open, self.texts, self.ids = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.open.append((tag, len(self.texts) - 1))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append("")
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        opened, _ = self.open.pop()
        assert opened == tag

    def handle_data(self, data):
        for _, place in self.open:
            self.texts[place] += data

    def all(self, tag, **attributes):
        """The texts of the elements with this tag and these attributes."""
        return [
            text
            for (name, has), text in zip(self.elements, self.texts, strict=True)
            if name == tag and attributes.items() <= has.items()
        ]

    def data(self):
        (text,) = self.all("script", type="application/json")
        return json.loads(text)

    def check_self_contained(self):
        """No element loads anything that is not in the file, nor does any style."""
        for tag, attributes in self.elements:
            for name in ("src", "href", "xlink:href", "srcset", "action"):
                value = attributes.get(name) or "#"
                assert value.startswith(("data:", "#")), (tag, name, value)
            assert tag not in ("link", "iframe", "object", "base")
            assert not any(name.startswith("on") for name in attributes)
        styles = self.all("style") + [a.get("style") or "" for _, a in self.elements]
        assert not re.search(r"@import|url\((?!#|\"?data:)", " ".join(styles))
        assert len(self.ids) == len(set(self.ids))


def make_results(folder, scores, prompts, title="Title", side=32):
    """Results of {model: {scorer: scores}}, with an image of its own colour for each."""
    images = [{} for _ in prompts]
    for number, (name, by_scorer) in enumerate(scores.items()):
        for i in range(len(prompts)):
            file = f"{number}_{i}.png"
            Image.new("RGB", (side, side), (40 * number, 10 * i, 99)).save(folder / file)
            own = {scorer: values[i] for scorer, values in by_scorer.items()}
            images[i][name] = ScoredImage(file, own)
    scorers = tuple(
        ScorerInfo(name, name.title(), 100.0 if name == "pickscore" else 1.0)
        for name in next(iter(scores.values()))
    )
    return Results(
        title=title,
        settings={"sampling": {"num_steps": 20}, "seed": 7},
        versions={"torch": "2.0"},
        scorers=scorers,
        models=tuple(ModelInfo(name, f"runs/{name}") for name in scores),
        # Seeds of more digits than JavaScript can count.
        prompts=tuple(PromptResult(p, 2**62 + i, images[i]) for i, p in enumerate(prompts)),
    )


def three_models(folder, n=6, **changes):
    rng = np.random.default_rng(0)
    scores = {
        name: {
            "pickscore": tuple(rng.normal(20 + gain, 1, n).tolist()),
            "aesthetic": tuple(rng.normal(5, 1, n).tolist()),
        }
        for name, gain in (("base", 0), ("spo", 1), ("<i>gradspo $x$", 6))
    }
    prompts = (HOSTILE + tuple(f"prompt {i}" for i in range(n)))[:n]
    return make_results(folder, scores, prompts, **changes)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_every_prompt_image_and_score_is_in_the_page(tmp_path):
    results = three_models(tmp_path, title="<Title> & more")
    page = read(write_report(tmp_path, results))
    assert page.all("h1") == page.all("title") == ["<Title> & more"]
    data = page.data()
    assert [row["prompt"] for row in data["prompts"]] == [p.prompt for p in results.prompts]
    assert [row["seed"] for row in data["prompts"]] == [str(p.seed) for p in results.prompts]
    for i, row in enumerate(data["prompts"]):
        for model, scores in zip(results.models, row["scores"], strict=True):
            own = results.prompts[i].images[model.name].scores
            assert scores == [own["pickscore"], own["aesthetic"]]
    images = [image for row in data["prompts"] for image in row["images"]]
    assert len(set(images)) == 18
    details = page.all("details")
    assert len(details) == 3 and "sampling.num_steps20" in details[1].replace("\n", "")


def test_half_a_character_does_not_stop_the_report(tmp_path):
    prompts, scores = [f"a {HALF_A_CHARACTER}"], {"base": {"pickscore": (20.0,)}}
    results = make_results(tmp_path, scores, prompts, title=HALF_A_CHARACTER)
    page = read(write_report(tmp_path, results))
    assert page.data()["prompts"][0]["prompt"] == prompts[0] and page.all("h1") == ["?"]


def test_the_page_needs_no_other_file_and_a_prompt_stays_text(tmp_path):
    page = read(write_report(tmp_path, three_models(tmp_path)))
    page.check_self_contained()
    assert not page.all("b") and not page.all("img") and len(page.all("i", **{"class": "swatch"}))
    code = [text for text in page.all("script") if "alert(1)" in text]
    assert len(code) == 1 and json.loads(code[0])  # data, which nothing runs
    policy = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    assert policy[0].startswith("default-src 'none'")


def test_the_table_says_what_the_summary_says(tmp_path):
    results = three_models(tmp_path, n=12)
    page = read(write_report(tmp_path, results))
    rows = summarize(results)
    numbers = page.all("td", **{"class": "number"})
    assert f"{rows[0].mean.mean:.3f}" in numbers and f"{rows[2].difference.mean:+.3f}" in numbers
    assert f"{100 * rows[2].win_rate.mean:.0f}" in numbers
    low, high = rows[2].difference.low, rows[2].difference.high
    assert f"[{low:+.3f}, {high:+.3f}]" in page.all("td", **{"class": "interval"})
    assert page.all("th", scope="rowgroup") == ["Pickscore × 100", "Aesthetic"]
    assert page.all("span", **{"class": "gain"})[-1] == "▲ better"
    best = [max(r.mean.mean for r in rows[:3]), max(r.mean.mean for r in rows[3:])]
    assert page.all("strong") == [f"{mean:.3f}" for mean in best]
    assert len(page.all("svg")) == 6
    assert "<i>gradspo $x$" in page.all("text")


def test_a_win_rate_below_all_is_not_rounded_to_all(tmp_path):
    scores = {"base": {"aesthetic": (0.0,) * 200}, "spo": {"aesthetic": (1.0,) * 199 + (-1.0,)}}
    results = make_results(tmp_path, scores, [f"prompt {i}" for i in range(200)], side=4)
    page = read(write_report(tmp_path, results))
    assert "99.5" in page.all("td", **{"class": "number"})
    assert page.all("td", **{"class": "interval"})[-1] == "[98, 100]"


def test_the_numbers_of_a_card_fit_in_the_widest_of_the_usual_fonts():
    css = (ROOT / "spo" / "evaluation" / "templates" / "page.css").read_text()
    size, width = (
        float(re.search(rf"^\.scores{cell} {{[^}}]*\b{name}: ([\d.]+)rem", css, re.M)[1])
        for cell, name in (("", "font-size"), (" td", "width"))
    )
    padding = float(re.search(r"^\.scores td {[^}]*padding-left: ([\d.]+)rem", css, re.M)[1])
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 1000)
    for text in ("−12.34", "+0.123", "−123.4", "−1234"):
        assert font.getlength(text) / 1000 * size + padding <= width, text


STRENGTHS = {  # two prompts each
    "base": ((20, 20), (5, 5)),
    "a": ((21, 21), (5, 5)),
    "b": ((22, 24), (5, 7)),
    "c": ((19, 19), (6, 6)),
}


def scaled_models(folder, strengths):
    scores = {
        name: dict(zip(("pickscore", "aesthetic"), each, strict=True))
        for name, each in STRENGTHS.items()
    }
    results = make_results(folder, scores, ["a", "b"])
    lora, base = f"{folder}/runs/<i>fox", replace(results.models[0], strength=0)
    loras = zip(results.models[1:], strengths, strict=True)
    models = [replace(model, lora=lora, strength=strength) for model, strength in loras]
    return replace(results, models=(base, *models))


def test_the_scores_over_the_strength_of_a_lora(tmp_path, monkeypatch):
    results, figures = scaled_models(tmp_path, (2, 0.5, 1)), {}

    def to_svg(figure, name):
        figures[name] = figure.axes[0]
        return figures_of_pages.to_svg(figure, name)

    monkeypatch.setattr(report, "to_svg", to_svg)
    page = read(write_report(tmp_path, results))
    page.check_self_contained()
    assert "<i>fox" in page.all("h3") and len(page.all("svg")) == 6 + 2
    texts = [" ".join(text.split()) for text in page.all("p")]
    assert (
        "The mean is largest at strength 0.5 by Pickscore × 100, at 0.5 and 1 by Aesthetic."
        in texts
    )
    panels = {name.split()[-1]: axes for name, axes in figures.items() if "strengths" in name}
    # A mean of two differences d and e is in 95 % of all resamples from the lesser to the larger.
    for scorer, means, low, high in (
        ("pickscore", (0, 3, -1, 1), (0, 2, -1, 1), (0, 4, -1, 1)),
        ("aesthetic", (0, 1, 1, 0), (0, 0, 1, 0), (0, 2, 1, 0)),
    ):
        line, (band,) = panels[scorer].lines[0], panels[scorer].collections
        assert list(line.get_xdata()) == [0, 0.5, 1, 2] and tuple(line.get_ydata()) == means
        corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
        assert corners == {
            (x, y) for side in (low, high) for x, y in zip((0, 0.5, 1, 2), side, strict=True)
        }


def test_no_curve_of_two_strengths(tmp_path):
    page = read(write_report(tmp_path, scaled_models(tmp_path, (0.5, 1, 1))))
    assert not [text for text in page.all("h2") if "Strength" in text]
    assert len(page.all("svg")) == 6


def test_identical_models_have_no_better_one(tmp_path):
    scores = {name: {"pickscore": (20.0, 21.0, 22.0)} for name in ("base", "copy")}
    page = read(write_report(tmp_path, make_results(tmp_path, scores, ["a", "b", "c"])))
    assert not page.all("strong") and not page.all("span", **{"class": "gain"})
    assert not page.all("span", **{"class": "loss"})
    numbers = page.all("td", **{"class": "number"})
    assert numbers == ["21.000", "3", "21.000", "+0.000", "50", "3", "3"]


def test_a_single_model_is_compared_with_nothing(tmp_path):
    results = make_results(tmp_path, {"base": {"pickscore": (20.0, 22.0)}}, ["a", "b"])
    page = read(write_report(tmp_path, results))
    assert page.all("td", **{"class": "number"}) == ["21.000", "2"]
    assert len(page.all("svg")) == 1


def test_of_many_prompts_the_largest_gains_and_losses_are_shown(tmp_path):
    gains = (0.1, -5.0, 0.2, 7.0, -0.1, 3.0, -2.0)
    scores = {"base": {"pickscore": (0.0,) * 7}, "spo": {"pickscore": gains}}
    results = make_results(tmp_path, scores, [f"prompt {i}" for i in range(7)])
    assert [chosen_prompts(results, k) for k in (1, 2, 3, 4)] == [
        [3],
        [1, 3],
        [1, 3, 5],
        [1, 3, 5, 6],
    ]
    assert chosen_prompts(results, 7) == chosen_prompts(results, 500) == list(range(7))
    page = read(write_report(tmp_path, results, max_prompts=3))
    assert [row["prompt"] for row in page.data()["prompts"]] == ["prompt 1", "prompt 3", "prompt 5"]
    assert [row["number"] for row in page.data()["prompts"]] == [2, 4, 6]
    assert any("Shown are 3 of 7 prompts" in text for text in page.all("p"))
    assert "7" in page.all("td", **{"class": "number"})  # the table is of all


def test_every_model_and_scorer_has_its_turn(tmp_path):
    scores = {
        "base": {"a": (0.0,) * 4, "b": (0.0,) * 4},
        "spo": {"a": (9.0, 0.0, 0.0, 0.0), "b": (0.0, 0.1, 0.0, 0.0)},
        "gradspo": {"a": (8.0, 0.0, 0.0, 0.0), "b": (0.0, 0.0, 0.0, -0.1)},
    }
    results = make_results(tmp_path, scores, list("wxyz"))
    assert chosen_prompts(results, 3) == [0, 1, 3]


def test_images_are_small_and_tiny_ones_exact(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "tiny.png")
    Image.new("RGB", (1024, 512), "red").save(tmp_path / "large.png")
    assert decoded(tmp_path / "large.png").size == (256, 128)
    tiny = decoded(tmp_path / "tiny.png")
    assert np.array_equal(tiny, Image.open(tmp_path / "tiny.png"))


def decoded(path):
    kind, _, data = embedded_image(path, (256, 256)).partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(BytesIO(base64.b64decode(data)))


def test_a_missing_image_is_named(tmp_path):
    results = three_models(tmp_path)
    (tmp_path / "1_2.png").unlink()
    with pytest.raises(UserError, match=r"1_2\.png: cannot be read as an image"):
        write_report(tmp_path, results)


# ---- runs ----------------------------------------------------------------------------------------


def metrics_line(rollout, updates_per_rollout=2):
    """What the trainer logs of a rollout, made by the functions that it calls."""
    generator = torch.Generator().manual_seed(rollout)
    scores = [torch.randn(4, 2, generator=generator) for _ in TIMESTEPS_OF_RUN]
    comparisons = [
        Comparison(t, each, gaps=each.amax(dim=0) - each.amin(dim=0))
        for t, each in zip(TIMESTEPS_OF_RUN, scores, strict=True)
    ]
    found = metrics.Metrics(torch.device("cpu"))
    pairs = torch.tensor([751, 751, 501, 1])
    metrics.note_rollout(found, comparisons, pairs, TIMESTEPS_OF_RUN)
    found.nanmean(f"kl_at/{TIMESTEPS_OF_RUN[rollout % 3]}", torch.tensor([rollout / 4]))
    return {
        "epoch": 1,
        "rollout": rollout,
        "step": rollout * updates_per_rollout,
        **metrics.summary({name: value.item() for name, value in found.sums.items()}),
        "seconds_rollout": 61.0,
        "seconds_train": 1.0,
        "peak_memory_gib": metrics.peak_memory_gib(torch.device("cpu")),
    }


def make_run(folder, lines, config, grids=0):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    record_start(folder, {"plan": {"num_processes": 2}, "prompts": HOSTILE[0]})
    tracking = Tracking(folder, "none", "project", {})
    for line in lines:
        tracking.log(line, step=line["step"])
    for epoch in range(grids):
        picture = Image.new("RGB", (40, 20), (90 * epoch, 0, 0))
        tracking.picture(f"validation/epoch_{epoch:04d}_policy", picture, step=epoch)
    return folder


@pytest.fixture
def run_dir(tmp_path):
    config = {"algorithm": "gradspo", "pretrained": {"model": "some/<model>"}, "seed": 42}
    return make_run(tmp_path / "run", [metrics_line(i) for i in range(1, 4)], config, grids=3)


def test_the_report_of_a_run(run_dir):
    page = read(write_run_report(run_dir))
    page.check_self_contained()
    assert page.all("h1") == ["run"]
    assert page.all("p")[0] == "gradspo on some/<model>"
    facts = dict(zip(page.all("dt"), page.all("dd"), strict=True))
    assert facts["rollouts"] == "3" and facts["updates"] == "6" and facts["pairs"] == "12"
    assert facts["time"] == "0:03:06"
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [image["alt"] for image in images] == [f"epoch_000{i}_policy" for i in range(3)]
    start, config = page.all("details")
    assert HOSTILE[0] in start and "plan.num_processes" in start and "torch" in start
    assert "pretrained.model" in config and "some/<model>" in config
    titles = page.all("text")
    assert "Pairs by timestep" in titles and "Mean score of the candidates" in titles
    assert "KL from the reference, nats" in titles
    assert "Loss" not in titles  # nothing was trained, so there is nothing to draw


def evaluated(run_dir, judges=(0.2, 0.4, -0.5), judge=HOSTILE[0]):
    """Adds evaluations of two prompts to a run: after each epoch the judge's mean gain."""
    found = [Evaluation(0, {"reward": [0, 1], f"judges/{judge}": [0, 1], "pixels/clipped": [0, 0]})]
    tracking = Tracking(run_dir, "none", "project", {})
    for epoch, gain in enumerate(judges, start=1):
        scores = {"reward": [0.1 * epoch, 1 + 0.1 * epoch], f"judges/{judge}": [gain, 1 + gain]}
        scores |= {"pixels/clipped": [0, 0.1 * epoch], "pixels/contrast": [0.2, 0.2 + 0.1 * epoch]}
        found[0].scores.setdefault("pixels/contrast", [0.2, 0.2])
        found.append(Evaluation(epoch, scores))
        at = {"evaluation": epoch, "epoch": epoch, "rollout": epoch, "step": 2 * epoch}
        tracking.log(at | decide(found).numbers(), step=2 * epoch)


def test_the_health_of_a_run(run_dir):
    assert "Health" not in read(write_run_report(run_dir)).all("h2")
    evaluated(run_dir)
    page = read(write_run_report(run_dir))
    page.check_self_contained()
    assert page.all("h2")[:2] == ["Health", "Validation images"]
    verdict = page.all("p")[1]
    assert verdict.startswith("epoch 3: reward +0.30 [+0.30, +0.30]") and HOSTILE[0] in verdict
    assert verdict.endswith("[-0.90, -0.90]); ship epoch 2")
    assert [text[:8] for text in page.all("li")] == ["epoch 1:", "epoch 2:", "epoch 3:"]
    assert page.all("figcaption")[2] == "epoch 0002 policy, to ship"
    assert {"Reward: the training scorer", f"Judge: {HOSTILE[0]}"} <= set(page.all("text"))


def test_the_figures_of_a_runs_health(run_dir, monkeypatch):
    evaluated(run_dir, judges=(0.9,))
    evaluated(run_dir)  # a resumed run made the first epoch's again
    drawn = []
    monkeypatch.setattr(health_figures, "to_svg", lambda figure, name: drawn.append(figure.axes[0]))
    health_figures.health_figures(evaluations(read_metrics(run_dir)))
    reward, judge, pixels, clipped = drawn
    assert reward.lines[0].get_ydata() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert judge.lines[0].get_ydata() == pytest.approx([0, 0.2, 0.4, -0.5])
    assert pixels.lines[0].get_ydata() == pytest.approx([1, 1.25, 1.5, 1.75])
    assert clipped.lines[0].get_ydata() == pytest.approx([0, 0.05, 0.1, 0.15])
    crosses = [line for line in judge.lines if line.get_marker() == "x"]
    assert [line.get_xydata().tolist() for line in crosses] == [[[3, -0.5]]]
    assert judge.get_xlabel() == "epochs  (dotted: 2, to ship)"


def test_numbers_by_timestep_that_a_rollout_lacks_are_blank():
    lines = [metrics_line(i) for i in (1, 2)] + [{"rollout": 3, "kl_at": {}}, metrics_line(4)]
    axes = Figure().add_subplot()
    (panel,) = (panel for panel in TRAINING if "kl_at" in panel.keys)
    _draw_heat(axes, lines, panel)
    (image,) = axes.images
    shown = image.get_array().filled(-1.0)
    assert shown.tolist() == [[0.25, -1, -1, 1.0], [-1, 0.5, -1, -1]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["501"]


def test_a_report_that_is_sent_round_names_no_home(run_dir, tmp_path):
    home = "/home/some body"
    paths = {"model": f"{home}/model", "vae": "~/secret/vae"}
    config = {"pretrained": paths, "logdir": f"{home}/runs", "lists": [f"{home}/a", 1]}
    (run_dir / "config.json").write_text(json.dumps(config))
    start = {"time": "now", "command": [f"{home}/train.py", f"--config.logdir={home}/runs"]}
    start |= {"prompts": f"4 prompts from {home}/p.txt (4 rows)", "resumed_from": f"{home}/x/y"}
    (run_dir / "starts.jsonl").write_text(json.dumps(start) + "\n")
    text = write_run_report(run_dir).read_text()
    assert "some body" not in text and "secret" not in text
    for kept in ("on model", "train.py --config.logdir=runs", "4 prompts from p.txt (4 rows)"):
        assert kept in text
    results = three_models(tmp_path)
    settings = {"models": [f"x={home}/a:0.5+~/secret/b"], **config}
    models = [replace(model, spec=f"x={home}/runs/{i}") for i, model in enumerate(results.models)]
    text = write_report(
        tmp_path, replace(results, models=tuple(models), settings=settings)
    ).read_text()
    assert "some body" not in text and "secret" not in text and "x=a:0.5+b" in text


def test_a_run_being_written_ends_at_its_last_whole_line(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "roll')
    assert "3" in read(write_run_report(run_dir)).all("dd")


def test_long_runs_and_unknown_values(run_dir):
    lines = [metrics_line(1) | {"rollout": i, "step": i, "loss": 0.7} for i in range(1, 301)]
    lines[5]["loss"] = None
    assert TRAINING[0] in panels_of(lines)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Loss" in read(write_run_report(run_dir)).all("text")
    assert draw_curves(run_dir).stat().st_size > 5000


def test_the_report_of_a_preference_model(tmp_path):
    totals = {"loss": 3.0, "steps": 4, "pairs": 8, "grad_norm": 2.0, "updates": 4}
    counts = {f"t{t}": 6.0 for t in (0, 251, 501, 701, 951)} | {
        "pairs": 8.0,
        "ties": 0.0,
        "damaged": 0.0,
    }
    line = {"step": 4, **step_metrics(Counter(totals)), "peak_memory_gib": 1.0}
    lines = [{"step": 0, **validation_metrics(counts)}, line | validation_metrics(counts)]
    config = {"pretrained": {"model": "base"}}
    page = read(write_run_report(make_run(tmp_path / "spm", lines, config)))
    page.check_self_contained()
    assert page.all("p")[0] == "step-aware preference model on base"
    titles = page.all("text")
    assert "Accuracy on the validation pairs" in titles and "t = 951" in titles
    assert "updates  (dashed: chance)" in titles
    assert not page.all("img")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics\.jsonl is missing or empty; name the directory of a training run"),
        ("", r"metrics\.jsonl is missing or empty"),
        ('{"step"', r"metrics\.jsonl is missing or empty"),
        ('{"step": 1}\nrubbish\n{"step": 2}\n', r"metrics\.jsonl, line 2: not JSON"),
    ],
)
def test_a_run_without_metrics_is_one_line(run_dir, content, message):
    path = run_dir / "metrics.jsonl"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=message):
        write_run_report(run_dir)


# ---- the script ----------------------------------------------------------------------------------


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_knows_runs_and_evaluations(tmp_path, run_dir, monkeypatch, capsys):
    write_results(three_models(tmp_path), tmp_path)
    call(monkeypatch, tmp_path, "--max_prompts=2")
    call(monkeypatch, run_dir)
    assert capsys.readouterr().out.split() == [f"{d}/report.html" for d in (tmp_path, run_dir)]
    assert len(read(tmp_path / "report.html").data()["prompts"]) == 2
    assert read(run_dir / "report.html").all("h1") == ["run"]


def test_the_script_says_how_to_finish_an_evaluation(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my eval"
    claim_prompts(folder, ["a fox"])
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, folder)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {folder} is an evaluation that has no results yet; `python scripts/evaluate.py "
        f"--config='{folder}/config.json' --config.run_name='my eval'` finishes it.\n"
    )


@pytest.mark.parametrize("arguments", [("nowhere",), (".", "--max_prompts=0")])
def test_the_script_says_in_one_line_what_is_wrong(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1


# ---- in a browser --------------------------------------------------------------------------------


def browse(path, fragment=""):
    """The page after its script ran; fails where the script complains."""
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
    ]
    command += ["--dump-dom", f"{path.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints
    return Page(done.stdout)


def cards(page):
    return [int(a["data-number"]) for _, a in page.elements if "data-number" in a]


@needs_browser
def test_the_script_makes_sorted_cards(tmp_path):
    results = three_models(tmp_path, n=30)
    path = write_report(tmp_path, results)
    page = browse(path, "#sort=loss&scorer=pickscore&model=spo")
    scorer = results.scorers[0]
    base, spo = (np.array(results.scores(model, scorer)) for model in results.models[:2])
    assert cards(page) == (np.argsort(spo - base) + 1).tolist()[:24]
    assert page.all("button", **{"class": "more"}) == ["Show 6 more"]
    assert len(page.all("img")) == 24 * 3
    assert page.all("bdi") == [results.prompts[i - 1].prompt for i in cards(page)]
    assert cards(browse(path, "#search=DOUBLE")) == [3]


@needs_browser
def test_the_script_shows_one_validation_grid(run_dir):
    page = browse(write_run_report(run_dir))
    figures = [attributes for tag, attributes in page.elements if tag == "figure"]
    assert ["hidden" in attributes for attributes in figures] == [True, True, False]
    assert "3 of 3" in page.all("span")
