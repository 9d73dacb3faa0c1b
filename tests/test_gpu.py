"""What a run says of GPUs that torch cannot use."""

import os
import sys

import pytest
import torch

from spo.errors import UserError
from spo.launch.__main__ import parse_options, plan_world
from spo.launch.workers import Workers
from spo.models.gpu import check_driver, pick_device

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
