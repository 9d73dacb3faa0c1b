"""What a run says it will cost before it begins, and at what rate it went."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_benchmark import small_config

from spo.costs import startup
from spo.costs.count import CHECKPOINTED, Costs, count_costs
from spo.costs.meta_cache import KnownShapes
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, SCORING, TRAINING, flop_counter
from spo.costs.startup import Forecast, batches, describe, make_forecast, warning
from spo.costs.weightless_models import META
from spo.launch.batch_plan import plan_batches
from spo.method.trainer import train
from spo.models.backbone import Backbone
from tests.small_runs import small_config as run_config

GIB = 2**30
COSTS = Costs(
    flops={ROLLOUT: 3 * 10**12, TRAINING: 10**12, CHECKPOINTED: 2 * 10**12},
    pairs=16,
    resident_bytes={"unet": 4 * GIB},
    peak_bytes={DENOISING: GIB, DECODING: GIB // 2, TRAINING: 10 * GIB, CHECKPOINTED: 2 * GIB},
)
CPU = torch.device("cpu")


def some_rollout(**changes):
    values = {"prompts": 10, "used": 20, "seconds_rollout": 4.0, "seconds_train": 6.0}
    return SimpleNamespace(**values | changes)


def test_rate_and_rest_by_hand():
    known = Forecast(COSTS, TRAINING)
    assert known.tflops(some_rollout()) == (10 * 3 + 20 * 1) / 10
    assert known.tflops(some_rollout(used=0)) == 3  # pairs that were trained on count, no others
    assert Forecast(COSTS, CHECKPOINTED).tflops(some_rollout()) == (10 * 3 + 20 * 2) / 10
    line = known.rest(some_rollout(), prompts_left=7200)
    assert line.startswith("rate: 1 s for a prompt and its pairs, 5 TFLOP/s in all; ")
    assert line.endswith("the 7200 prompts that are left take 2 hours")
    line = Forecast().rest(some_rollout(), prompts_left=90)
    assert "TFLOP/s" not in line and line.endswith("take 1.5 minutes")
    assert Forecast().tflops(some_rollout()) is None


def test_what_is_in_memory_at_once():
    config = small_config(**{"sample.batch_size": 2, "train.batch_size": 3})
    plan = plan_batches(config, 1)
    assert batches(config, plan, TRAINING) == {DENOISING: 2, DECODING: 2 * 3, TRAINING: 3}
    config.sample.decode_batch_size = 4
    assert batches(config, plan, CHECKPOINTED) == {DENOISING: 2, DECODING: 4, CHECKPOINTED: 3}
    text = describe(COSTS, {DENOISING: 2, DECODING: 4, TRAINING: 3}, 24 * GIB)
    assert "3 TFLOP for the rollout of a prompt, 1 for the training of a pair (without" in text
    assert "4 all the time, 6 in denoising of 2 prompts, 6 in decoding of 4 images, 34 in" in text
    assert text.endswith("training of 3 pairs; there are 24")


@pytest.mark.parametrize(
    ("part", "batch", "memory", "advice"),
    [
        (TRAINING, 3, 30, "lower train.batch_size to 2"),
        (DENOISING, 50, 10, "lower sample.batch_size to 5"),
        (DECODING, 50, 10, "lower sample.decode_batch_size to 10"),
        (TRAINING, 3, 10, "set train.gradient_checkpointing=true, with train.batch_size up to 2"),
        (CHECKPOINTED, 3, 5, "train.batch_size = 1 does not fit either"),
    ],
)
def test_a_warning_names_the_key(monkeypatch, part, batch, memory, advice):
    monkeypatch.setattr(startup, "count_costs", lambda config, trainings: COSTS)
    assert batch > COSTS.largest_batch(part, memory * GIB)
    line = warning(None, COSTS, part, batch, memory * GIB)
    need = 4 + batch * COSTS.peak_bytes[part] / GIB
    assert line.startswith(f"warning: {part} of {batch} ") and line.endswith(advice)
    assert (
        f"will need {need:.3g} GiB of memory, and of {memory} there are {memory * 0.9:.3g} " in line
    )


def said(config, monkeypatch, memory):
    lines = []
    monkeypatch.setattr(startup, "device_memory", lambda device: memory)
    made = make_forecast(config, plan_batches(config, 1), CPU, lines.append)
    return made, lines


def test_a_start_warns_of_what_does_not_fit_alone(monkeypatch):
    config = small_config(estimate_costs=True, **{"train.batch_size": 8})
    costs = count_costs(config, [TRAINING])
    assert CHECKPOINTED not in costs.flops
    need = costs.bytes_of(TRAINING, 8)
    made, lines = said(config, monkeypatch, need / 0.9 + 100)
    assert made == Forecast(costs, TRAINING) and not [x for x in lines if x.startswith("warning")]
    _, lines = said(config, monkeypatch, need / 0.9 - 100)
    assert [x for x in lines if x.startswith("warning: ")] == lines[2:] and len(lines) == 3
    assert lines[2].endswith("lower train.batch_size to 7")


def test_what_cannot_be_counted_stops_nothing(monkeypatch):
    config = small_config(estimate_costs=True, **{"preference.scorer": "my:scorer"})
    made, lines = said(config, monkeypatch, GIB)
    assert made.costs.flops[SCORING] == 0 and "(without the preference model" in lines[1]
    config.pretrained.model = "./no"
    made, lines = said(config, monkeypatch, GIB)
    assert made == Forecast()
    assert lines[1].startswith("estimate: none (UserError: pretrained.model: './no' is neither")
    config.estimate_costs = False
    assert said(config, monkeypatch, GIB) == (Forecast(), [])


def test_a_loss_of_the_users_own_is_not_called():
    config = small_config(algorithm="tests.test_forecast:objective")
    assert count_costs(config, [TRAINING]) == count_costs(small_config(), [TRAINING])


def objective_that_fails():
    from spo.method.losses import Objective

    def loss(*arguments):
        raise AssertionError("called on shapes alone")

    return Objective(loss, uses_ema=True, shares_latents=True)


objective = objective_that_fails()


def test_counting_leaves_random_state_and_dtypes_alone():
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    count_costs(small_config(mixed_precision="bf16"), [CHECKPOINTED])
    assert torch.equal(torch.randn(2), expected)


def test_known_shapes_give_and_count_the_same():
    x = torch.empty(4, 6, device=META)
    with flop_counter() as counter, KnownShapes(counter) as known:
        first, again = x @ x.t(), x @ x.t()
        assert counter.get_total_flops() == 2 * (2 * 4 * 6 * 4)
        assert first is not again and first.stride() == again.stride()
        assert first.untyped_storage()._cdata != again.untyped_storage()._cdata
        flipped = x.t() @ x  # other shapes are worked out
        assert flipped.shape == (6, 6) and len(known._known) == 2
        assert [(a + 1).tolist() for a in (torch.zeros(1), torch.ones(1))] == [[1], [2]]  # numbers
        view = torch.ops.aten._unsafe_view(x, [24])  # says it is none
        assert torch.ops.aten._unsafe_view(x, [24]).untyped_storage()._cdata == (
            view.untyped_storage()._cdata
        )


def test_a_cpu_shares_what_is_free(monkeypatch, tmp_path):
    free = psutil.virtual_memory().available
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < startup.device_memory(CPU) <= free / 3
    (tmp_path / "memory.max").write_text("1024\n")
    monkeypatch.setattr(startup, "_CGROUPS", (tmp_path / "memory.max",))
    assert startup.device_memory(CPU) == 256
    (tmp_path / "memory.max").write_text("max\n")
    assert startup.device_memory(CPU) > 10**6


def test_a_run_says_its_estimate_first_and_its_rate_once(tmp_path, capsys, monkeypatch):
    order, load = [], Backbone._load

    def noted(self, source):
        order.append(capsys.readouterr().out)
        return load(self, source)

    monkeypatch.setattr(Backbone, "_load", noted)
    config = run_config(tmp_path / "run", estimate_costs=True, eval_interval=0)
    train(config)
    assert len(order) == 1  # the models with weights loaded after the estimate
    assert re.search(r"TFLOP for the rollout .*\n.*GiB of memory: .* there are ", order[0])
    rates = [x for x in capsys.readouterr().out.splitlines() if "rate: " in x]
    assert len(rates) == 1 and "the 6 prompts that are left take " in rates[0]
    costs = count_costs(config, [TRAINING])
    file = tmp_path / "run" / "metrics.jsonl"
    for line in map(json.loads, Path(file).read_text().splitlines()):
        used = line["pairs"] - line["pairs_left_over"]
        flops = 2 * costs.flops[ROLLOUT] + used * costs.flops[TRAINING]
        seconds = line["seconds_rollout"] + line["seconds_train"]
        assert line["tflops"] == pytest.approx(flops / seconds / 1e12)
