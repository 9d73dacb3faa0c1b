"""Numbers that go wrong anywhere stop the run with one line, and the last checkpoint is good."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from helpers import COLLECT, random_pairs
from safetensors.torch import load_file
from test_learner import make_learner

from spo.errors import RunError
from spo.method.collect import score_candidates
from spo.method.health import Fault, check_images, check_skipped, find_faults
from spo.method.learner import Learner, Step
from spo.models.optimizers import Update
from spo.run.checkpoint_folder import checkpoints, read_state
from spo.scorers import Scorer
from spo.types import Candidates
from tests.small_runs import LORA, read_metrics, run, run_in_processes

PROMPTS = ("a fox", "a bear", "a whale")
TIMESTEPS = [751, 301, 51]


@pytest.fixture(scope="module")
def step_and_batch(sd15):
    """A sound minibatch of the three prompts, and its step."""
    learner = make_learner(copy.deepcopy(sd15))
    batch = random_pairs(learner.backbone, TIMESTEPS, seed=0)
    return learner.train_minibatch(batch, 0), batch


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "term", ["win_policy", "win_reference", "lose_policy", "lose_reference", "of_ones_own"]
)
def test_predictions(step_and_batch, term, value):
    step, batch = step_and_batch
    assert find_faults([(batch, step)], PROMPTS) == []
    bad = step.output.terms["win_policy"].clone()
    bad[1] = value
    broken = replace(step, output=replace(step.output, terms=step.output.terms | {term: bad}))
    text = "predictions are not finite at t = [301] for the prompts 'a bear'"
    assert find_faults([(batch, step), (batch, broken)], PROMPTS) == [Fault(1, False, text)]


def test_loss_and_gradient(step_and_batch):
    step, batch = step_and_batch
    infinite = torch.tensor(torch.inf)
    steps = [
        replace(step, update=Update(infinite, skipped=True)),
        replace(step, update=None),
        replace(step, update=Update(infinite, skipped=False)),
        replace(step, output=replace(step.output, loss=infinite)),
    ]
    where = "not finite at t = [51, 301, 751] for the prompts 'a fox', 'a bear', 'a whale'"
    assert find_faults([(batch, step) for step in steps], PROMPTS) == [
        Fault(2, True, f"the gradient is {where}"),
        Fault(3, False, f"the loss is {where}"),
    ]


def test_the_cause_comes_before_what_follows_from_it():
    everywhere, cause, later = Fault(4, True, "a"), Fault(4, False, "b"), Fault(5, False, "c")
    assert min([everywhere, later, cause]) == cause


@pytest.mark.parametrize(
    ("algorithm", "network"),
    [("gradspo", "policy"), ("gradspo", "reference"), ("gradspo", "ema")]
    + [("spo", "policy"), ("spo", "reference")],
)
def test_an_infinite_prediction_is_seen_through_the_clips(own_backbone, algorithm, network):
    learner = make_learner(own_backbone("sd15"), algorithm)
    batch = random_pairs(learner.backbone, TIMESTEPS, seed=0)
    own = learner.predict(batch)
    bad = getattr(own, network).detach().clone()
    bad[1, 0, 0, 0, 0] = torch.inf
    predictions = replace(own, **{network: bad})
    output = learner.loss(predictions, batch, learner.sampler)
    if (algorithm, network) == ("gradspo", "reference"):
        assert output.loss.isfinite()
    (fault,) = find_faults([(batch, Step(output, None, {}))], PROMPTS)
    assert fault.text.startswith("predictions are not finite at t = [301] for the prompts 'a bear'")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_has_no_score(value):
    latents = torch.zeros(2, 3, 4, 8, 8)
    latents[1, 2, 0, 0, 0] = value

    class Blind(Scorer):
        def score(self, images, features, timestep):
            return torch.ones(len(images))

    candidates = Candidates((), latents, 51, is_final=False)
    scores = score_candidates(candidates, lambda x: x, Blind(), torch.zeros(3, 1), COLLECT)
    expected = torch.ones(2, 3)
    expected[1, 2] = torch.nan
    assert torch.equal(scores.isnan(), expected.isnan())


def test_drawn_images():
    images = torch.zeros(3, 3, 8, 8)
    check_images(images, PROMPTS, "base")
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(RunError, match="images of base are not finite for the prompts 'a bear'; "):
        check_images(images, PROMPTS, "base")


def newest_is_finite(folder):
    newest = checkpoints(folder)[-1]
    files = [newest / LORA, newest / "ema" / LORA, newest / "optimizer.safetensors"]
    return all(t.isfinite().all() for file in files for t in load_file(file).values())


def test_a_network_that_goes_bad_in_training(tmp_path, monkeypatch):
    own, calls = Learner.predict, []

    def breaking(learner, pairs):
        calls.append(pairs)
        found = own(learner, pairs)
        return replace(found, ema=found.ema * torch.inf) if len(calls) == 10 else found

    monkeypatch.setattr(Learner, "predict", breaking)
    with pytest.raises(
        RunError,
        match=r"predictions are not finite at t = .*, in rollout 3, about step \d+; the last",
    ):
        run(tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1].name == "epoch_0001"
    assert newest_is_finite(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_both_processes_stop_where_one_goes_bad(tmp_path, bad):
    # 2 minibatches of a rollout on each process: the fifth is of the second epoch.
    folder = tmp_path / "run"
    assert run_in_processes(folder, 2, {bad: {"NAN_AT": "5"}}) == [1, 1]
    log = folder.with_suffix(".log").read_text()
    assert log.count("error: the loss is not finite at t = ") == 2 and "Traceback" not in log
    assert newest_is_finite(folder)


def test_many_skipped_updates_in_a_row_stop_a_run_and_are_kept(tmp_path, monkeypatch):
    """3 minibatches make an update, a rollout has 4: the third rollout has the third and fourth."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**120)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    changes = {"mixed_precision": "fp16", "train__max_skipped_updates": 3, "eval_interval": 0}
    message = "train.max_skipped_updates: the fp16 gradients of 4 updates in a row overflowed"
    for _ in range(2):  # from the start, then from the checkpoint
        with pytest.raises(RunError, match=message):
            run(tmp_path / "run", **changes)
        assert [line["skipped_updates"] for line in read_metrics(tmp_path / "run")] == [1, 1]
        (checkpoint,) = checkpoints(tmp_path / "run")
        assert read_state(checkpoint)["skipped_in_a_row"] == 2
    assert newest_is_finite(tmp_path / "run")


def test_one_update_that_is_made_ends_the_row(own_backbone):
    learner = make_learner(own_backbone("sd15"))
    batch = random_pairs(learner.backbone, TIMESTEPS, seed=0)
    learner.skipped_in_a_row = 2
    check_skipped(learner.skipped_in_a_row, limit=3)
    learner.train_minibatch(batch, 0)
    assert learner.skipped_in_a_row == 0
