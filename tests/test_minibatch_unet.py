"""Passes over minibatches that are recorded and replayed give what passes as written give."""

from functools import partialmethod

import pretend_cuda
import pytest
import torch
from helpers import load_backbone, randn, random_pairs
from test_learner import TIMESTEPS, equal, make_learner
from torch import nn

from spo.errors import RunError
from spo.models.device import SpeedSettings, minibatch_unet, speed_up
from spo.models.minibatch_unet import MinibatchUNet
from tests.small_runs import differences, run_in_processes


@pytest.fixture
def recordings(monkeypatch):
    """Pretends CUDA graphs on the CPU, and returns the list of the passes that were recorded."""
    made = []

    def record(module, inputs, pool):
        made.append(len(inputs[0]))
        return pretend_cuda.make_graphed_callables(module, inputs, pool)

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return made


def train(family, wrapper, sizes, **changes):
    """Returns a learner after an update for every two minibatches of these sizes, and its losses."""
    backbone = load_backbone(family)
    learner = make_learner(backbone, wrapper=wrapper, accumulation_steps=2, **changes)
    steps = []
    for i, size in enumerate(sizes):
        pairs = random_pairs(backbone, TIMESTEPS[:size], seed=i)
        steps.append(learner.train_minibatch(pairs, i))
    return learner, [step.output.loss.item() for step in steps]


@pytest.mark.parametrize(
    ("family", "algorithm", "merge"),
    [("sd15", "gradspo", True), ("sd15", "gradspo", False), ("sdxl", "spo", True)],
)
def test_replayed_passes_are_those_as_written(recordings, family, algorithm, merge):
    sizes = [1, 3, 3, 2, 3, 3]  # the first rollout had few pairs; the fourth minibatch is its last
    changes = {"algorithm": algorithm, "merge": merge}
    written, losses = train(family, None, sizes, **changes)
    replayed, found = train(family, lambda unet: MinibatchUNet(unet, record=True), sizes, **changes)
    networks = 3 if algorithm == "gradspo" else 2
    assert recordings == [2] * networks + [6] * networks  # rows: guidance doubles them
    assert found == losses and len(set(losses)) > 3
    assert equal(replayed.lora.parameters, written.lora.parameters)
    if written.ema:
        assert equal(replayed.ema, written.ema)


def test_predictions_outlive_the_next_minibatch(recordings):
    backbone = load_backbone("sd15")
    graphs = lambda unet: MinibatchUNet(unet, record=True)  # noqa: E731
    learner = make_learner(backbone, wrapper=graphs, guidance_scale=1.0)
    first = learner.predict(random_pairs(backbone, TIMESTEPS, seed=0))
    kept = [each.detach().clone() for each in (first.policy, first.reference, first.ema)]
    learner.predict(random_pairs(backbone, TIMESTEPS, seed=5))
    assert len(recordings) == 3
    for now, then in zip((first.policy, first.reference, first.ema), kept, strict=True):
        assert torch.equal(now, then)


def test_a_unet_that_cannot_be_recorded(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nCompile with")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(RunError, match=r"^cuda_graphs: .* is capturing\); set it to False\.$"):
        train("sd15", lambda unet: MinibatchUNet(unet, record=True), [1])


@pytest.mark.slow
def test_under_ddp(tmp_path):
    changes = {"train.batch_size": 2, "train.gradient_accumulation_steps": 2}
    graphs = {rank: {"GRAPHS": "1"} for rank in range(2)}
    for name, environments in (("written", {}), ("replayed", graphs)):
        assert run_in_processes(tmp_path / name, 2, environments, **changes) == [0, 0]
    assert differences(tmp_path / "written", tmp_path / "replayed") == []


def test_what_is_recorded_where():
    settings = SpeedSettings(False, False, False, False, cuda_graphs=True)
    assert not minibatch_unet(load_backbone("sd15"), settings).record  # no CUDA


@pytest.mark.slow
def test_compilation_is_for_the_sizes_of_rollouts(monkeypatch):
    traced = []

    def backend(graph, _):
        traced.append(graph)
        return graph

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    backbone = load_backbone("sd15")
    settings = SpeedSettings(False, True, True, False, cuda_graphs=False)
    learner = make_learner(backbone, wrapper=lambda _: minibatch_unet(backbone, settings))
    speed_up(backbone, None, settings)
    latents, conditioning = randn(2, *backbone.latent_shape, seed=1), backbone.encode_prompts(["a"])
    try:
        learner.train_minibatch(random_pairs(backbone, TIMESTEPS[:1], seed=0), 0)
        generator = torch.Generator().manual_seed(0)
        drawn = backbone.draw(["a"], latents[:1], "ddim", 1, 5.0, [generator])
        assert traced == []
        with torch.no_grad(), learner.drawing_network():
            for rows in (1, 2, 1):
                given = conditioning.select(torch.zeros(rows, dtype=torch.long))
                backbone.predict(backbone.unet, latents[:rows], 501, given, 5.0, autocast=False)
            counted = len(traced)
            backbone.decode_candidates(latents)
            assert len(traced) > counted > 1
        counted = len(traced)
        assert torch.equal(drawn, backbone.draw(["a"], latents[:1], "ddim", 1, 5.0, [generator]))
        learner.train_minibatch(random_pairs(backbone, TIMESTEPS[:2], seed=0), 1)
        assert len(traced) == counted
    finally:
        torch.compiler.reset()
