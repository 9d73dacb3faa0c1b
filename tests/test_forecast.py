"""What a run says it will cost before it begins, and at what rate it went."""

import re
import sys

import psutil
import pytest
import torch
from test_benchmark import LATENT_REWARD, SIZES, small_config

from spo.costs import forecast
from spo.costs.count import CHECKPOINTED, Costs, count_costs
from spo.costs.forecast import describe, print_estimate
from spo.costs.load import META, load_models
from spo.costs.meter import DECODING, DENOISING, ROLLOUT, SCORING, TRAINING
from spo.launch import __main__ as launch
from spo.launch.batch_plan import plan_batches
from spo.method.build import read_recipe
from spo.method.metrics import time_left
from spo.method.start import train
from tests.small_runs import small_config as run_config

GIB = 2**30
COSTS = Costs(
    flops={ROLLOUT: 3 * 10**12, TRAINING: 10**12, CHECKPOINTED: 2 * 10**12},
    pairs=16,
    resident_bytes={"unet": 4 * GIB},
    peak_bytes={DENOISING: GIB, DECODING: GIB // 2, SCORING: GIB // 4}
    | {TRAINING: 10 * GIB, CHECKPOINTED: 2 * GIB},
)
LESS = "(train.gradient_checkpointing=true needs less)"


def test_time_left_by_hand():
    line = time_left(10.0, prompts=10, prompts_left=7200)
    assert line.startswith("rate: 1 s for a prompt and its pairs; ")
    assert line.endswith("the 7200 prompts that are left take 2 hours")
    assert time_left(10.0, prompts=10, prompts_left=90).endswith("take 1.5 minutes")


def test_lines_tell_the_costs():
    first, *rest = describe(COSTS, {DENOISING: 2, DECODING: 4, TRAINING: 3}, 50 * GIB)
    assert "3 TFLOP for the rollout of a prompt, 1 for the training of a pair (without" in first
    assert [line.removeprefix("estimate: ") for line in rest] == [
        "denoising of 2 prompts will need 6 GiB of memory, and there are 50",
        "decoding of 4 images will need 6 GiB of memory, and there are 50",
        "training of 3 pairs will need 34 GiB of memory, and there are 50",
    ]


@pytest.mark.parametrize(
    ("part", "batch", "memory", "advice"),
    [
        (TRAINING, 3, 30, f"lower train.batch_size to 2 {LESS}"),
        (DENOISING, 50, 10, "lower sample.batch_size to 5"),
        (DECODING, 50, 10, "lower sample.decode_batch_size to 10"),
        (SCORING, 50, 10, "lower sample.score_batch_size to 20"),
        (TRAINING, 3, 10, f"train.batch_size = 1 does not fit either {LESS}"),
        (CHECKPOINTED, 3, 5, "train.batch_size = 1 does not fit either"),
    ],
)
def test_a_warning_names_the_key(part, batch, memory, advice):
    assert batch > COSTS.largest_batch(part, memory * GIB)
    training = CHECKPOINTED if part == CHECKPOINTED else TRAINING
    sizes = {DENOISING: 0, DECODING: 0, SCORING: 0, training: 0} | {part: batch}
    (line,) = [x for x in describe(COSTS, sizes, memory * GIB) if x.startswith("warning: ")]
    need = 4 + batch * COSTS.peak_bytes[part] / GIB
    assert line.startswith(f"warning: {part} of {batch} ") and line.endswith(f"; {advice}")
    assert (
        f"will need {need:.3g} GiB of memory, and of {memory} there are {memory * 0.9:.3g} " in line
    )


def test_recorded_passes_keep_their_memory_beside_rollouts():
    sizes = {DENOISING: 2, DECODING: 4, TRAINING: 1}
    denoising, decoding, training = describe(COSTS, sizes, 17 * GIB, records=True)[1:]
    assert "denoising of 2 prompts will need 16 GiB" in denoising
    assert denoising.endswith("lower sample.batch_size to 1 (cuda_graphs=false needs less)")
    assert decoding.endswith("lower sample.decode_batch_size to 2 (cuda_graphs=false needs less)")
    assert training.endswith("training of 1 pairs will need 14 GiB of memory, and there are 17")


@pytest.fixture
def said(monkeypatch, capsys):
    """Returns a function: the lines that the launcher prints on a device with so much memory."""

    def lines(config, memory, held=0):
        monkeypatch.setattr(forecast, "device_memory", lambda device, processes: (memory, held))
        print_estimate(read_recipe(config), plan_batches(config, 1), "cpu", processes=1)
        return capsys.readouterr().out.splitlines()

    return lines


def test_only_what_does_not_fit_is_warned_of(said):
    changes = {"sample.batch_size": 2, "sample.decode_batch_size": 4, "train.batch_size": 8}
    config = small_config(estimate_costs=True, **changes)
    costs = count_costs(load_models(read_recipe(config), META), [TRAINING])
    assert CHECKPOINTED not in costs.flops
    need = costs.bytes_of(TRAINING, 8)
    lines = said(config, need / 0.9 + 100)
    sizes = {DENOISING: 2, DECODING: 4, TRAINING: 8}
    assert lines[1:] == describe(costs, sizes, need / 0.9 + 100)
    lines = said(config, need / 0.9 - 100)
    assert [x for x in lines if x.startswith("warning: ")] == lines[4:] and len(lines) == 5
    assert lines[4].endswith(f"lower train.batch_size to 7 {LESS}")
    config.sample.decode_batch_size = 100
    assert "decoding of 6 images" in said(config, GIB)[3]
    *_, line = said(config, 50 * GIB, held=30 * GIB)
    assert line == "estimate: other processes hold 30 GiB of a GPU's memory"
    lines = said(config, costs.bytes_of(TRAINING, 0) / 0.9)
    assert [x.rpartition("; ")[2] for x in lines[2:]] == [
        "sample.batch_size = 1 does not fit either",
        "sample.decode_batch_size = 1 does not fit either",
        f"train.batch_size = 1 does not fit either {LESS}",
    ]


def test_a_scorer_of_latents_is_estimated_by_its_own_batch(said):
    config = small_config(estimate_costs=True, **LATENT_REWARD["sd15"])
    config.sample.score_batch_size = 100
    assert "scoring of 24 latents will need" in said(config, GIB)[3]
    costs = count_costs(load_models(read_recipe(config), META), [])
    line = said(config, (costs.bytes_of(SCORING, 23) + 100) / 0.9)[3]
    assert line.endswith("; lower sample.score_batch_size to 23")


@pytest.mark.parametrize(
    ("scorer", "part"),
    [("scorers_for_tests:brightness", DECODING), ("test_image_scorers:latent_mean", SCORING)],
)
def test_what_cannot_be_counted_stops_nothing(said, scorer, part):
    config = small_config(estimate_costs=True, **{"preference.scorer": scorer})
    assert "(without the preference model" in said(config, GIB)[1]
    costs = count_costs(load_models(read_recipe(config), META), [])
    assert costs.flops[SCORING] == 0 and set(costs.peak_bytes) == {DENOISING, part}
    config.pretrained.model = "./no"
    lines = said(config, GIB)
    assert lines[1].startswith("estimate: none (UserError: pretrained.model: './no' is neither")


def test_a_loss_of_the_users_own_is_not_called():
    config = small_config(algorithm="tests.test_forecast:Failing")
    ours, theirs = (load_models(read_recipe(each), META) for each in (config, small_config()))
    assert count_costs(ours, [TRAINING]) == count_costs(theirs, [TRAINING])


class Failing:
    """A loss that fails when it is called."""

    uses_ema = shares_latents = True

    def __call__(self, predictions, pairs, sampler):
        raise AssertionError("called on shapes alone")


def test_counting_leaves_dtypes_alone():
    count_costs(
        load_models(read_recipe(small_config(mixed_precision="bf16")), META), [CHECKPOINTED]
    )
    assert torch.get_default_dtype() is torch.float32


def test_a_cpu_shares_what_is_free():
    free = psutil.virtual_memory().available
    available, held = forecast.device_memory("cpu", processes=4)
    assert 0 < available <= free / 3 and held == 0


def test_the_launcher_says_the_estimate_and_the_run_its_rate_once(tmp_path, capsys, monkeypatch):
    changes = {"estimate_costs": True, "eval_interval": 0, "logdir": tmp_path, "run_name": "run"}
    arguments = [f"--config.{key}={value}" for key, value in (SIZES | changes).items()]
    command = ["launch", "--cpu", "train_sd15.py", "--config=tests/data/random_models.py"]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    monkeypatch.setattr(launch, "run_processes", lambda command, world: print("starts") or 0)
    with pytest.raises(SystemExit):
        launch.main()
    before, _, _ = capsys.readouterr().out.partition("starts")
    assert re.search(r"TFLOP for the rollout .*\n.*GiB of memory, .* there are ", before)
    train(run_config(tmp_path / "run", eval_interval=0))
    rates = [x for x in capsys.readouterr().out.splitlines() if "rate: " in x]
    assert len(rates) == 1 and "the 6 prompts that are left take " in rates[0]
