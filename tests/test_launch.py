"""The launcher: what it starts on GPUs and on the CPU, and what it says instead."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest
import torch
from accelerate.commands.config import load_config_from_file

from spo.errors import RunError, UserError
from spo.launch.__main__ import SCRIPTS, parse_options, plan_world
from spo.launch.processes import World
from spo.launch.workers import Workers

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE_CONFIGS = ROOT / "config" / "accelerate"

SCRIPT = """
from absl import app
from spo.command_line.flags import define_config, parse_flags

CONFIG = define_config("tests/data/random_models.py")

def main(_):
    import os
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator()
    total = accelerator.reduce(torch.ones(1)).item()
    print(f"world {accelerator.num_processes} sum {total:.0f} on {accelerator.device.type} "
          f"seed {CONFIG.value.seed} threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    accelerator.end_training()  # a process group left open aborts some exits

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
"""


OWN = "--config=tests/data/random_models.py"  # a script of one's own has no default that is known


def start(*arguments, cwd=ROOT):
    """Starts the launcher without the settings that a test runner may have in its environment."""
    unwanted = ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU")
    env = {key: value for key, value in os.environ.items() if key not in unwanted}
    return subprocess.Popen(
        [sys.executable, "-m", "spo.launch", *arguments],
        cwd=cwd,
        env=env | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def world_of(**options):
    given = [f"--{name}={value}" for name, value in options.items() if name != "cpu"]
    given += ["--cpu"] if options.get("cpu") else []
    return plan_world(parse_options(["train_sd15.py", *given])[0])


@pytest.fixture
def gpus(monkeypatch):
    """A function that pretends that the machine has a number of GPUs, and a restored environment."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda number: monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


def test_a_mistake_is_one_line_before_anything_starts():
    process = start("--cpu", "train_sd15.py", "--config.train.betta=5")
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert err == "error: config: unknown key train.betta; did you mean train.beta?\n"


def test_bad_input_is_one_line_for_several_processes_too():
    process = start(
        "--cpu",
        "--num_processes=2",
        "train_sd15.py",
        "--config=tests/data/random_models.py",
        "--config.sample.eta=0",
    )
    out, err = process.communicate()
    assert process.returncode == 2
    assert out.splitlines()[1].startswith("checking config, models and data")
    assert err.startswith("error: sample.eta: 0.0 must be") and err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_names_launch_tiny():
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(ROOT / "launch_sd15.sh")]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert "bash launch_tiny.sh" in result.stderr and "--cpu" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_process_count_that_cannot_work_is_refused():
    process = start("--cpu", "--num_processes=3", "train_sd15.py")
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert "1, 2, 4, 5, 8, 10, 20, 40" in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_launches_of_two_cpu_processes_at_the_same_time(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = ("--cpu", str(script), "--num_processes", "2", "--config.seed=5", OWN)
    processes = [start(*arguments) for _ in range(2)]
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.startswith("16 prompts per rollout = slice 8 x processes 2 x slices 1")
        assert out.count("world 2 sum 2 on cpu seed 5 threads ") == 2


def test_one_cpu_process_keeps_the_exit_status_of_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("import os\n", "raise SystemExit(7)\n", 1))
    process = start("--cpu", str(script), OWN)
    process.communicate()
    assert process.returncode == 7


def test_a_script_of_ones_own_needs_a_config(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = start("--cpu", str(script), "--config.seed=5")
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.startswith("error: --config=FILE is missing; ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "path",
    ["train_sd15.py", "train_sdxl.py", "scripts/train_preference_model.py", "scripts/evaluate.py"],
)
def test_the_table_says_what_the_script_says(path):
    script = SCRIPTS[Path(path).name]
    shown = subprocess.run(
        [sys.executable, path, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert f"(default: '{script.config}')" in shown.stdout


@pytest.mark.parametrize(
    ("number", "given", "processes"),
    [
        (1, {}, 1),
        (4, {}, 4),
        (8, {}, 8),
        (8, {"num_processes": 2}, 2),
        (8, {"num_processes": 1}, 1),
    ],
)
def test_one_process_for_each_gpu_or_as_many_as_asked_for(gpus, number, given, processes):
    gpus(number)
    assert world_of(**given) == World(processes, processes)


def test_two_machines(gpus):
    gpus(4)
    file = str(ACCELERATE_CONFIGS / "two_nodes_of_four.yaml")
    address = {"machine_rank": 1, "main_process_ip": "10.0.0.1"}
    world = world_of(accelerate_config=file, **address)
    assert world == World(8, 4, 2, 1, "10.0.0.1", 29500)
    with pytest.raises(UserError, match="--main_process_ip is missing"):
        world_of(accelerate_config=file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_processes": 3}, "3 processes on 1 machine"),
        ({"num_processes": 0}, "--num_processes=0 counts"),
        ({"num_machines": 0}, "--num_machines=0"),
        ({"accelerate_config": "missing.yaml"}, "no such file: missing.yaml"),
    ],
)
def test_worlds_that_cannot_be(gpus, given, message):
    gpus(2)
    with pytest.raises(UserError, match=message):
        world_of(**given)


def test_gpus_that_a_file_names(gpus, tmp_path):
    file = tmp_path / "accelerate.yaml"
    text = (ACCELERATE_CONFIGS / "four_gpus.yaml").read_text()
    file.write_text(
        text.replace("gpu_ids: all", "gpu_ids: 1,3").replace("processes: 4", "processes: 2")
    )
    gpus(2)
    assert world_of(accelerate_config=str(file)) == World(2, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"


def test_accelerate_reads_its_files():
    processes = {
        file.name: load_config_from_file(str(file)).num_processes
        for file in ACCELERATE_CONFIGS.glob("*.yaml")
    }
    assert processes == {"one_gpu.yaml": 1, "four_gpus.yaml": 4, "two_nodes_of_four.yaml": 8}


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_what_splits_the_model_is_refused(gpus, tmp_path, kind):
    file = tmp_path / "accelerate.yaml"
    text = (ACCELERATE_CONFIGS / "four_gpus.yaml").read_text()
    file.write_text(text.replace("MULTI_GPU", kind))
    gpus(4)
    assert world_of(accelerate_config=str(file)) == World(4, 4)
    assert os.environ[f"ACCELERATE_USE_{kind}"] == "true"  # as `accelerate launch` sets it
    with pytest.raises(UserError, match=f"distributed_type {kind} in the accelerate config"):
        Workers(rank_timeout=120)


def test_a_timeout_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="rank_timeout: 0 must be"):
        Workers(rank_timeout=0)


def test_two_machines_by_options_and_on_the_cpu(gpus):
    gpus(4)
    place = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}
    assert world_of(**place) == World(8, 4, 2, 1, "10.0.0.1", 29500)
    world = world_of(cpu=True, **place, num_processes=4, main_process_port=29600)
    assert world == World(4, 2, 2, 1, "10.0.0.1", 29600)
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
    with pytest.raises(UserError, match="--num_processes=3 counts the processes of all machines"):
        world_of(cpu=True, **place, num_processes=3)
    with pytest.raises(UserError, match="--main_process_ip is missing"):
        world_of(cpu=True, num_machines=2, machine_rank=0)


@pytest.mark.parametrize(
    ("address", "own", "expected"),
    [
        ("10.0.0.1", "", "eth1"),
        ("10.0.0.1", "ib0", "ib0"),
        ("node1", "ib0", "ib0"),
        ("127.0.0.1", "", ""),
        ("localhost", "", ""),
    ],
)
def test_gloo_takes_the_interface_towards_the_first_machine(
    gpus, monkeypatch, address, own, expected
):
    gpus(1)
    os.environ["GLOO_SOCKET_IFNAME"] = own
    names, probe = {"node1": "127.0.1.1", "localhost": "127.0.0.1"}, MagicMock()
    probe.return_value.__enter__.return_value.getsockname.return_value = "10.0.0.2", 40000
    monkeypatch.setattr(socket, "socket", probe)
    resolved = lambda host, port, **_: [(2, 2, 17, "", (names.get(host, host), port))]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    found = {"lo": "127.0.0.1", "eth0": "192.168.0.2", "eth1": "10.0.0.2"}
    addresses = {name: [SimpleNamespace(address=address)] for name, address in found.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: addresses)
    world_of(num_machines=2, machine_rank=1, main_process_ip=address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == expected
    os.environ["GLOO_SOCKET_IFNAME"] = ""
    with pytest.raises(UserError, match="--main_process_ip=node1 means 127.0.1.1 here, which no"):
        world_of(num_machines=2, machine_rank=0, main_process_ip="node1")


def test_weights_that_differ_from_those_of_rank_0_stop_the_run(monkeypatch):
    workers = Workers(rank_timeout=120)
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    workers.check_equal("LoRA", weights)
    other = {"a": weights["a"], "b": torch.nextafter(weights["b"], torch.tensor([4.0]))}
    found = []
    monkeypatch.setattr(workers, "gather", lambda values: found.append(values[0]) or values)
    workers.check_equal("LoRA", other)
    monkeypatch.setattr(workers, "gather", lambda values: [*values, found[0]])
    workers.check_equal("LoRA", other)
    with pytest.raises(RunError, match="LoRA of rank 1 differs"):
        workers.check_equal("LoRA", weights)
