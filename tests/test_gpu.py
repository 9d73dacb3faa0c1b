"""What a run says of GPUs that torch cannot use, and of memory that is full."""

import os
import subprocess
import sys
from types import SimpleNamespace

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

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update it\nand"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that pretends that NVML counts GPUs, that CUDA works, and what nvidia-smi says."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("ACCELERATE_USE_CPU", None)

    def start():
        raise RuntimeError(TOO_OLD)

    def pretend(gpus, usable, says="", name="nvidia-smi"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "init", start)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        smi = tmp_path / name
        smi.write_text(f'#!{sys.executable}\nimport sys\nprint("{says}", *sys.argv[1:], sep="|")\n')
        smi.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return pretend


@pytest.mark.parametrize(("gpus", "usable"), [(0, False), (2, True)])
def test_a_machine_without_a_gpu_or_with_a_usable_one_is_fine(machine, gpus, usable):
    machine(gpus, usable)
    check_driver()


def test_gpus_that_cannot_talk_directly_talk_through_the_cpu(machine, monkeypatch):
    names = ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE")
    machine(2, True)
    check_driver()
    assert not os.environ.keys() & {*names}
    monkeypatch.setattr(gpu, "check_cuda_p2p_ib_support", lambda: False)
    os.environ["NCCL_IB_DISABLE"] = "0"  # the user's
    check_driver()
    assert [os.environ[name] for name in names] == ["1", "0"]


@pytest.mark.parametrize("start", [pick_device, lambda: Workers(120), check_driver])
def test_a_driver_that_is_too_old_is_one_line_and_no_run_on_the_cpu(machine, start):
    machine(2, False, "550.54.15")
    with pytest.raises(UserError) as caught:
        start()
    line = str(caught.value)
    assert line.startswith(f"torch {torch.__version__}, built for CUDA 13.0, cannot use the GPU ")
    assert "under driver 550.54.15|--query-gpu=driver_version|--format=csv" in line
    assert f"({TOO_OLD.splitlines()[0]}); install driver 580 or newer, or a torch" in line
    assert line.endswith("--index-url https://download.pytorch.org/whl/cu126")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    check_driver()


def test_the_launcher_says_it_unless_it_is_to_run_on_the_cpu(machine):
    machine(2, False, name="another-program")
    with pytest.raises(UserError, match="cannot use the GPU under driver unknown"):
        plan_world(parse_options(["train_sd15.py"])[0])
    assert plan_world(parse_options(["train_sd15.py", "--cpu"])[0]).processes == 1
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


@pytest.mark.parametrize(
    ("free", "expected"), [((70, 50), (50, 30)), ((70, "[N/A]"), (70, 10)), (("", ""), (80, 0))]
)
def test_the_memory_of_gpus_is_what_the_fullest_has_free(machine, monkeypatch, free, expected):
    machine(2, True)
    gpus = [SimpleNamespace(uuid=f"a-{i}", total_memory=80 * 2**20) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    told = dict(zip(("--id=GPU-a-0", "--id=GPU-a-1"), map(str, free), strict=True))

    def run(command, **_):
        assert command[:2] == ["nvidia-smi", "--query-gpu=memory.free"] and "nounits" in command[2]
        return subprocess.CompletedProcess(command, 0, f"{told[command[3]]}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert device_memory("cuda", processes=2) == tuple(n * 2**20 for n in expected)


ADVICE = "GiB is free. If reserved but unallocated memory is large try setting X"


def fill(monkeypatch, owner, method, call):
    """Lets a call of a method find a GPU's memory full."""
    own, calls = getattr(owner, method), []

    def full(*arguments, **options):
        calls.append(method)
        if len(calls) == call:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 9 GiB; 1 {ADVICE}")
        return own(*arguments, **options)

    monkeypatch.setattr(owner, method, full)


@pytest.mark.parametrize(
    ("owner", "method", "call", "keys", "changes"),
    [
        (Backbone, "predict", 2, "a rollout .*: lower sample.batch_size;", {"eval_interval": 0}),
        (Backbone, "decode_candidates", 2, "candidates .*: lower sample.decode_batch_size;", {}),
        (
            LatentRewardScorer,
            "score",
            2,
            "candidates .*: lower sample.score_batch_size;",
            judged("sd15"),
        ),
        (
            *(Learner, "predict", 9),
            "minibatch .*: lower train.batch_size, or set train.gradient_checkpointing=true;",
            {},
        ),
    ],
)
def test_full_memory_is_one_line_that_names_the_key(
    tmp_path, monkeypatch, owner, method, call, keys, changes
):
    with monkeypatch.context() as patch, pytest.raises(RunError, match=keys) as caught:
        fill(patch, owner, method, call)
        run(tmp_path / "run", **changes)
    assert str(caught.value).endswith(
        "(CUDA out of memory. Tried to allocate 9 GiB; 1 GiB is free.)"
    )
    if owner is Learner:  # in the second epoch
        run(tmp_path / "run")
        assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1, 1, 2, 2]


@pytest.mark.slow
def test_full_memory_of_one_process_in_training_ends_both(tmp_path):
    statuses = run_in_processes(tmp_path / "run", 2, {1: {"FULL_AT": "2"}}, num_epochs=1)
    log = (tmp_path / "run.log").read_text()
    assert statuses == [1, 1]  # rank 0 loses the connection
    assert "error: a minibatch did not fit into the GPU's memory: lower train.batch_size" in log


@pytest.mark.parametrize(
    ("device", "error", "left"),
    [
        ("cuda", RunError("full"), ["gloo"]),
        ("cuda", Stopped("by a signal"), ["all"]),
        ("cuda", None, ["all"]),
        ("cpu", RunError("full"), ["all"]),
    ],
)
def test_an_error_does_not_wait_for_collectives_on_a_gpu(monkeypatch, device, error, left):
    workers, found = Workers(rank_timeout=120), []
    workers.device, workers._on_cpu = torch.device(device), "gloo"
    monkeypatch.setattr(workers.accelerator, "end_training", lambda: found.append("all"))
    monkeypatch.setattr(dist, "destroy_process_group", found.append)
    workers.__exit__(type(error), error, None)
    assert found == left


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ["expandable_segments:True"] * 2),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, ["None", "max_split_size_mb:128"]),
        ({"PYTORCH_ALLOC_CONF": ""}, ["", "None"]),
    ],
)
def test_segments_of_memory_expand_unless_the_user_says_otherwise(own, expected):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    code = f"""
import os, sys
import spo.command_line.flags
assert "torch" not in sys.modules
print(*map(os.environ.get, {names}), sep=",")
"""
    env = {name: value for name, value in os.environ.items() if name not in names}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | own, capture_output=True, text=True
    )
    assert shown.stdout.strip().split(",") == expected
