"""What a run says of GPUs that torch cannot use, and of memory that is full."""

import os
import subprocess
import sys
from itertools import count
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from spo.errors import RunError, Stopped, UserError
from spo.launch.__main__ import parse_options, plan_world
from spo.launch.workers import Workers
from spo.method.learner import Learner
from spo.models import gpu
from spo.models.backbone import Backbone
from spo.models.gpu import check_driver, device_memory, pick_device
from spo.scorers.latent_reward_scorer import LatentRewardScorer
from tests.small_runs import ROOT, judged, read_metrics, run, run_in_processes

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040)."
FULL = "CUDA out of memory. Tried to allocate 9 GiB; 1 GiB is free."


@pytest.fixture
def machine(monkeypatch):
    """A function that sets the GPUs that NVML counts, if CUDA works, and what nvidia-smi says."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("ACCELERATE_USE_CPU", None)

    def pretend(gpus, usable, says):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "init", Mock(side_effect=RuntimeError(TOO_OLD)))
        monkeypatch.setattr(torch.version, "cuda", "13.0")

        def answer(command, **_):
            if says is None:
                raise FileNotFoundError(command[0])
            assert command[0] == "nvidia-smi" and command[2] == "--format=csv,noheader,nounits"
            return subprocess.CompletedProcess(command, 0, f"{says[(*command[1::2],)]}\nmore\n")

        monkeypatch.setattr(subprocess, "run", answer)

    return pretend


def test_a_machine_without_a_gpu_or_with_usable_ones_is_fine(machine, monkeypatch):
    names = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
    for gpus in (0, 2):
        machine(gpus, bool(gpus), {})
        check_driver()
    assert not os.environ.keys() & {*names}
    monkeypatch.setattr(gpu, "check_cuda_p2p_ib_support", lambda: False)  # as of two RTX 4090
    os.environ["NCCL_IB_DISABLE"] = "0"  # the user's
    check_driver()
    assert [os.environ[name] for name in names] == ["1", "0"]


@pytest.mark.parametrize(
    "start", [pick_device, lambda: Workers(120), lambda: plan("train_sd15.py")]
)
@pytest.mark.parametrize("driver", ["550.54.15", None])
def test_a_driver_that_is_too_old_is_one_line_and_no_run_on_the_cpu(machine, start, driver):
    machine(2, False, driver and {("--query-gpu=driver_version",): driver})
    with pytest.raises(UserError) as caught:
        start()
    assert str(caught.value) == (
        f"torch {torch.__version__}, built for CUDA 13.0, cannot use the GPU under driver "
        f"{driver or 'unknown'} ({TOO_OLD}); install driver 580 or newer, or a torch for an older "
        "CUDA: pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126"
    )
    assert plan("train_sd15.py", "--cpu").processes == 1
    check_driver()  # in the process that this starts


def plan(*arguments):
    return plan_world(parse_options(list(arguments))[0])


@pytest.mark.parametrize(
    ("free", "expected"), [((70, 50), (50, 30)), ((70, "[N/A]"), (70, 10)), (("", ""), (80, 0))]
)
def test_the_memory_of_gpus_is_what_the_fullest_has_free(machine, monkeypatch, free, expected):
    machine(2, True, {("--query-gpu=memory.free", f"--id=GPU-{i}"): free[i] for i in range(2)})
    properties = lambda i: SimpleNamespace(uuid=i, total_memory=80 * 2**20)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert device_memory("cuda", processes=2) == tuple(n * 2**20 for n in expected)


@pytest.mark.parametrize(
    ("owner", "method", "call", "keys", "changes"),
    [
        (
            Backbone,
            "predict",
            2,
            "rollout .*: lower sample.batch_size, or set cuda",
            {"eval_interval": 0},
        ),
        (Backbone, "decode_candidates", 2, "candidates .*: lower sample.decode_batch_size;", {}),
        (LatentRewardScorer, "score", 2, ".*: lower sample.score_batch_size;", judged("sd15")),
        (Learner, "predict", 9, "minibatch .*: lower train.batch_size, or set train.gradient_", {}),
    ],
)
def test_full_memory_is_one_line_that_names_the_key(
    tmp_path, monkeypatch, owner, method, call, keys, changes
):
    own, calls = getattr(owner, method), count(1)

    def full(*arguments, **options):
        if next(calls) == call:
            raise torch.OutOfMemoryError(f"{FULL} If reserved but unallocated memory is large try")
        return own(*arguments, **options)

    monkeypatch.setattr(owner, method, full)
    with pytest.raises(RunError, match=keys) as caught:
        run(tmp_path / "run", **changes)
    assert str(caught.value).endswith(f"({FULL})")
    if owner is Learner:  # in the second epoch
        run(tmp_path / "run")
        assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 1, 2, 2]


@pytest.mark.slow
def test_full_memory_of_one_process_in_training_ends_both(tmp_path):
    statuses = run_in_processes(tmp_path / "run", 2, {1: {"FULL_AT": "2"}}, num_epochs=1)
    assert statuses == [1, 1]  # rank 0 loses the connection
    assert "error: a minibatch did not fit into the GPU's" in (tmp_path / "run.log").read_text()


@pytest.mark.parametrize(
    ("device", "error", "left"),
    [
        ("cuda", RunError("full"), "gloo"),
        ("cuda", Stopped("by a signal"), "all"),
        ("cuda", None, "all"),
        ("cpu", RunError("full"), "all"),
    ],
)
def test_an_error_does_not_wait_for_collectives_on_a_gpu(monkeypatch, device, error, left):
    workers, found = Workers(rank_timeout=120), []
    workers.device, workers._on_cpu = torch.device(device), "gloo"
    monkeypatch.setattr(workers.accelerator, "end_training", lambda: found.append("all"))
    monkeypatch.setattr(dist, "destroy_process_group", found.append)
    workers.__exit__(type(error), error, None)
    assert found == [left]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "expandable_segments:True expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, "None max_split_size_mb:128"),
        ({"PYTORCH_ALLOC_CONF": ""}, " None"),
    ],
)
def test_segments_of_memory_expand_unless_the_user_says_otherwise(own, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = f"import os, spo.command_line.flags as f; print(*map(os.environ.get, {names}))"
    env = {name: value for name, value in os.environ.items() if name not in names} | own
    shown = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
    assert shown == f"{expected}\n"
