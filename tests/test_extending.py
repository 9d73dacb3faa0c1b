"""docs/extending.md as printed: every example imports, runs, and changes what it says it changes."""

import ast
import json
import re
import shlex
import sys

import pytest
import torch
from helpers import randn

from tests.small_runs import ROOT, run

PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}
SIX = (
    "A loss with a parameter of its own",
    "A rule that chooses pairs",
    "A scorer",
    "A number in metrics.jsonl",
    "A schedule of timesteps",
    "A new family of base models",
)


def code(title):
    """The Python of a section."""
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS[title], re.DOTALL)
    return block


def settings(title):
    """The config keys that the command of a section sets, with their values."""
    (command,) = re.findall(r"```bash\n(.*?)```", SECTIONS[title], re.DOTALL)
    script, *flags = shlex.split(command.replace("\\\n", ""))[1:]
    assert script == "train_sd15.py" and flags[0] == "--config=config/tiny.py"
    pairs = [flag.removeprefix("--config.").split("=", 1) for flag in flags[1:]]
    return {key: ast.literal_eval(v) if v[0] == "{" else v for key, v in pairs}


@pytest.fixture
def train_as_printed(tmp_path, monkeypatch):
    """A function that trains with the file and the command of a section; returns its metrics."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(ROOT)

    def train(title, name, **changes):
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert f"`{name}.py`" in SECTIONS[title]
        (tmp_path / f"{name}.py").write_text(code(title))
        # With the sizes of a run of seconds, and without the loss that these sizes come with.
        own = {"algorithm": "gradspo", "num_epochs": 1, "eval_interval": 0} | settings(title)
        folder = run(tmp_path / "run", **{key.replace(".", "__"): v for key, v in own.items()})
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    return train


def test_the_page_has_the_six_examples_each_of_at_most_25_lines():
    assert tuple(SECTIONS) == SIX
    assert all(len(code(title).splitlines()) <= 25 for title in SIX)


def test_a_loss(train_as_printed):
    lines = train_as_printed(SIX[0], "my_loss")
    assert all(line["loss"] > 0 and "margin" in line for line in lines)
    assert "win_ratio" not in lines[0]  # of the built-in losses
    from my_loss import Smoothed

    from spo.types import NoisePredictions
    from tests.helpers import make_pairs, two_point_sampler

    policy, noise = randn(1, 1, 4, 2, 2, seed=0), randn(1, 2, 4, 2, 2, seed=1)
    pairs = make_pairs(torch.zeros(1, 1, 4, 2, 2), noise, noise, timesteps=[1])
    predictions = NoisePredictions(policy, torch.zeros_like(policy), None)
    sampler = two_point_sampler(abar=0.75, abar_next=0.9)
    plain, half = (Smoothed(10.0, s)(predictions, pairs, sampler) for s in (0.0, 0.5))
    # -log sigmoid(10 m), and the mean of that and of its mirror image.
    margin = 10 * plain.terms["margin"]
    torch.testing.assert_close(plain.loss, torch.log1p(torch.exp(-margin)).mean())
    mirror = torch.log1p(torch.exp(margin)).mean()
    torch.testing.assert_close(half.loss, (plain.loss + mirror) / 2)


def test_a_pair_rule(train_as_printed):
    lines = train_as_printed(SIX[1], "my_pairs")
    from my_pairs import two_by_two

    chosen = two_by_two(torch.tensor([[3.0], [0.0], [2.0], [1.0]]), torch.Generator())
    assert (chosen.win.tolist(), chosen.lose.tolist()) == ([0, 2], [1, 3])
    # Two candidates: second best against second worst is the worst against the best, and no pair.
    assert all(line["pairs"] == line["comparisons"] for line in lines)


def test_a_scorer(train_as_printed):
    lines = train_as_printed(SIX[2], "my_scorer")
    assert all(abs(line["score_mean"]) < 4 for line in lines)  # of pixels in [-1, 1], twice
    from my_scorer import make

    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    scorer = make(torch.device("cpu"), weight=2.0)
    assert scorer.score(red, scorer.encode_prompts(["red"]), 1).tolist() == [4.0]


def test_a_number():
    exec(compile(code(SIX[3]), "extending.md", "exec"), {})


def test_a_schedule(train_as_printed):
    lines = train_as_printed(SIX[4], "my_timesteps")
    timesteps = [int(t) for t in lines[0]["pairs_at"]]
    from my_timesteps import karras

    from spo.method.ddim import make_sampler

    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    sampler = make_sampler(config, 20, eta=1.0, timesteps="my_timesteps:karras")
    assert sampler.timesteps[0] == 999 and sampler.timesteps[-1] >= 1
    steps = karras(4, sampler.alphas_cumprod, 1)
    assert timesteps == steps[2:]  # of four steps, branching from the third


def test_a_sampler_of_a_new_family():
    found = {}
    exec(compile(code(SIX[5]), "extending.md", "exec"), found)
    flow = found["Flow"]((1000, 500))
    # A model that is right: x_t = (1 - s) x0 + s noise, and the output is noise - x0.
    x0, noise = randn(1, 4, 2, 2, seed=0), randn(1, 4, 2, 2, seed=1)
    latents = 0.5 * x0 + 0.5 * noise
    prediction = flow.predict(noise - x0, latents, 500)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.epsilon, noise)
    assert (flow.next(1000), flow.next(500)) == (500, 0)
    torch.testing.assert_close(flow.step(prediction, 500, noise), x0)
