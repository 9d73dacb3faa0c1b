"""AdamW with moments of 8 bits: bitsandbytes' own where it is installed, and a stand-in for it."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import randn, unet_output
from safetensors.torch import load_file, save_file
from torch import nn
from torch.autograd import _unsafe_preserve_version_counter as unsafe_preserve_version_counter

from spo.costs.count import count_costs
from spo.costs.load import META, load_models
from spo.errors import UserError
from spo.method.build import read_recipe
from spo.method.learner import Learner
from spo.models.optimizers import (
    check_optimizer,
    make_optimizer,
    moment_bytes,
    optimizer_tensors,
    restore_optimizer,
)
from tests.small_runs import differences, run, small_config

CPU = torch.device("cpu")
# Rank 128: matrices of 4,096 weights and more, and smaller ones.
RUN = {"train__optimizer": "adamw8bit", "eval_interval": 0, "lora__rank": 128}


class StandIn(torch.optim.Optimizer):
    """State as bitsandbytes.optim.AdamW8bit keeps it, and a momentum that makes use of it.

    Like its kernels it changes parameters behind torch's back: their version stays.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8):
        super().__init__(parameters, {"lr": lr})
        self.levels = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                with unsafe_preserve_version_counter(parameter):
                    self._step(parameter, self.state[parameter])

    @torch.no_grad()
    def _step(self, parameter, state):
        size = parameter.numel()
        if not state:
            state["step"] = 0
            kind = torch.uint8 if size >= 4096 else torch.float32
            state |= {f"state{i}": torch.zeros_like(parameter, dtype=kind) for i in (1, 2)}
            if kind is torch.uint8:
                for i in (1, 2):
                    state[f"qmap{i}"] = self.levels[i - 1]
                    state[f"absmax{i}"] = torch.zeros(-(-size // 256))
        assert type(state["step"]) is int
        state["step"] += 1
        if size < 4096:
            state["state1"].mul_(0.9).add_(parameter.grad)
            parameter.sub_(state["state1"], alpha=self.param_groups[0]["lr"])
            return
        scales = state["absmax1"].repeat_interleave(256)[:size].view_as(parameter)
        momentum = 0.9 * state["qmap1"][state["state1"].long()] * scales + parameter.grad
        parameter.sub_(momentum, alpha=self.param_groups[0]["lr"])
        blocks = torch.zeros(-(-size // 256) * 256)
        blocks[:size] = momentum.flatten()
        largest = blocks.view(-1, 256).abs().amax(dim=1).clamp_min(1e-12)
        state["absmax1"].copy_(largest)
        share = blocks.view(-1, 256) / largest[:, None]
        kept = ((share + 1) * 127.5).round().to(torch.uint8).flatten()[:size]
        state["state1"].copy_(kept.view_as(parameter))


@pytest.fixture(params=["stand-in", "bitsandbytes"])
def library(request, monkeypatch):
    """What AdamW8bit comes from."""
    if request.param == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    else:
        put(monkeypatch, StandIn)


def put(monkeypatch, optimizer):
    module = SimpleNamespace(AdamW8bit=optimizer)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)


class OnGPU(nn.Parameter):
    is_cuda = True


def some_steps(optimizer, parameters, steps):
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = randn(*parameter.shape, seed=10 * step + len(name))
        optimizer.step()


@pytest.mark.parametrize("kind", [nn.Parameter, OnGPU])
@pytest.mark.parametrize("kind_before", [nn.Parameter, OnGPU])
def test_adamw_goes_on_fused_or_not(kind, kind_before, tmp_path):
    """On a GPU it is fused, and goes on from the checkpoint of either."""

    def make(of):
        parameters = {"a": of(torch.ones(40, 8)), "bc": of(torch.ones(3))}
        return make_optimizer("adamw", parameters.values(), lr=0.1), parameters

    whole, expected = make(nn.Parameter)
    some_steps(whole, expected, range(5))
    before, parameters = make(kind_before)
    some_steps(before, parameters, range(3))
    save_file(optimizer_tensors(before, parameters), tmp_path / "optimizer.safetensors")
    optimizer, resumed = make(kind)
    assert bool(optimizer.defaults["fused"]) == (kind is OnGPU)
    for name, parameter in resumed.items():
        parameter.data.copy_(parameters[name].data)
    restore_optimizer(optimizer, resumed, load_file(tmp_path / "optimizer.safetensors"))
    some_steps(optimizer, resumed, range(3, 5))
    for name, parameter in resumed.items():
        assert optimizer.state[parameter]["step"] == 5
        torch.testing.assert_close(parameter.data, expected[name].data, rtol=1e-5, atol=1e-6)
    meta = {"a": nn.Parameter(torch.ones(40, 8, device="meta"))}
    elsewhere = torch.optim.AdamW(meta.values())
    elsewhere.defaults["fused"] = optimizer.defaults["fused"]
    restore_optimizer(elsewhere, meta, {"step:a": torch.tensor(3.0)})
    on = elsewhere.state[meta["a"]]["step"].device.type
    assert on == ("meta" if kind is OnGPU else "cpu")


def test_its_moments_take_the_bytes_that_are_counted(library):
    parameters = [nn.Parameter(torch.ones(*shape)) for shape in ((4, 10), (64, 65), (100, 41))]
    optimizer = make_optimizer("adamw8bit", parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(parameter.max() < 1 for parameter in parameters)
    storages = {}
    for state in optimizer.state.values():
        for value in filter(torch.is_tensor, state.values()):
            storages[value.data_ptr()] = value.nbytes
    assert sum(storages.values()) == moment_bytes("adamw8bit", parameters)
    assert moment_bytes("adamw", parameters) == 8 * (40 + 64 * 65 + 4100)


def test_a_resumed_run_is_the_whole_run(library, tmp_path):
    whole = run(tmp_path / "whole", **RUN)
    part = run(tmp_path / "part", num_epochs=1, **RUN)
    checkpoint = part / "checkpoints" / "epoch_0001"
    state = load_file(checkpoint / "optimizer.safetensors")
    kinds = {name.partition(":")[0]: tensor.dtype for name, tensor in state.items()}
    assert kinds["qmap1"] is torch.float32 and kinds["step"] is torch.int64
    assert {t.dtype for n, t in state.items() if n.startswith("state1")} == {
        torch.uint8,
        torch.float32,
    }
    run(part, **RUN)
    assert differences(whole, part) == []


def test_candidates_are_drawn_with_what_was_learned(tmp_path, monkeypatch):
    """By the merged LoRA (the default), which is merged once a rollout."""
    put(monkeypatch, StandIn)
    drawing, learners, moves, merges = Learner.drawing_network, [], [], []

    @contextlib.contextmanager
    def checked(learner):
        learners.append(learner)
        expected = unet_output(learner.backbone)  # not merged
        with learner.lora.using(None):
            moves.append((expected - unet_output(learner.backbone)).abs().max())
        with drawing(learner):
            torch.testing.assert_close(
                unet_output(learner.backbone), expected, rtol=1e-3, atol=1e-3
            )
            yield

    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: merges.append(0) or addmm(*a, **k))
    monkeypatch.setattr(Learner, "drawing_network", checked)
    changes = {"algorithm": "spo", "train__learning_rate": 1e3}
    run(tmp_path / "run", **(RUN | changes))
    assert len(merges) == len(learners) * len(learners[0].lora.layers) and len(learners) == 4
    first, *later = moves
    assert first == 0 and min(later) > 1


def test_a_resumed_run_keeps_its_optimizer(tmp_path, monkeypatch):
    put(monkeypatch, StandIn)
    run(tmp_path / "run", num_epochs=1, eval_interval=0)
    with pytest.raises(
        UserError, match="train.optimizer: 'adamw8bit', but .* with 'adamw'; its st"
    ):
        run(tmp_path / "run", train__optimizer="adamw8bit", eval_interval=0)


def test_the_estimate_counts_it(tmp_path):
    sizes = []
    for name in ("adamw", "adamw8bit"):
        config = small_config(tmp_path / "run", train__optimizer=name, lora__rank=128)
        costs = count_costs(load_models(read_recipe(config), META), [])
        sizes.append(costs.resident_bytes["LoRAs, gradient, optimizer"])
    parameter = [torch.ones(128, 32), torch.ones(32, 128)]
    one = moment_bytes("adamw", parameter) - moment_bytes("adamw8bit", parameter)
    assert sizes[0] - sizes[1] > 8 * one > 0


def test_an_optimizer_that_is_none_or_not_installed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="train.optimizer: 'sgd' is none of adamw, adamw8bit"):
        run(tmp_path / "run", train__optimizer="sgd")
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    wanted = r'train.optimizer: bitsandbytes is not installed .*pip install "spo\[bitsandbytes\]"'
    with pytest.raises(UserError, match=wanted):
        run(tmp_path / "run", train__optimizer="adamw8bit")
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_does_not_run_here(monkeypatch):
    class Broken(StandIn):
        def step(self):
            raise NotImplementedError("no kernel\nfor this device")

    put(monkeypatch, Broken)
    with pytest.raises(
        UserError, match=r"train.optimizer: .* run on cpu here \(Not.*: no kernel for"
    ):
        check_optimizer("adamw8bit", CPU)
    check_optimizer("adamw", CPU)
