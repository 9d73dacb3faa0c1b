"""The launcher passes signals on to the training processes and ends with their status."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Like a training script, as far as signals and statuses go: the seed says how it ends.
SCRIPT = """
import os, signal, sys, time
from absl import app
from spo.errors import UserError
from spo.launch.exit_status import note_handlers
from spo.command_line.flags import define_config, exit_on_user_error, parse_flags

CONFIG = define_config("tests/data/random_models.py")
PREFLIGHT = "spo.launch.batch_plan:plan_batches"  # nothing that imports torch
signals = []

def main(_):
    seed = CONFIG.value.seed
    if seed == 8:  # still loads its models
        sys.stdout.write(f"training {os.getpid()}\\n")
        sys.stdout.flush()
        time.sleep(60)
    signal.signal(signal.SIGTERM, lambda *_: signals.append("SIGTERM"))
    signal.signal(signal.SIGINT, lambda *_: signals.append("SIGINT"))
    note_handlers()
    with exit_on_user_error():
        sys.stdout.write(f"training {os.getpid()}\\n")  # in one piece: torchrun unbuffers it
        sys.stdout.flush()
        if seed == 1:
            raise RuntimeError("a bug")
        if seed == 2:
            raise UserError("data: of no use")
        while seed != 0 and (seed == 9 or not signals):
            time.sleep(0.05)
        time.sleep(1)  # to save; a signal too many would show
        sys.stdout.write(f"saved {' '.join(signals)}\\n")
        if signals:
            raise SystemExit(75)

if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
"""


@pytest.fixture
def launch(tmp_path):
    """A function that launches the script and returns when `running` of its processes train."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started = []

    def launch(processes, seed, running=None):
        arguments = ["--cpu", f"--num_processes={processes}", script, f"--config.seed={seed}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "spo.launch", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        process.training = []
        while len(process.training) < (processes if running is None else running):
            line = process.stdout.readline()
            assert line, process.communicate()
            if line.startswith("training"):
                process.training.append(psutil.Process(int(line.split()[1])))
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def gone(processes, timeout):
    return not psutil.wait_procs(processes, timeout=timeout)[1]


@pytest.mark.parametrize(
    ("processes", "number"),
    [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM), (2, signal.SIGINT)],
)
def test_a_signal_to_the_launcher_lets_the_training_save(launch, processes, number):
    process = launch(processes, seed=42)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    # Each of them once: neither the terminal nor torchrun sends another.
    assert out.splitlines() == ["saved SIGTERM"] * processes
    assert "Traceback" not in err and "error" not in err.lower()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_interrupt_kills_everything_at_once(launch, processes):
    process = launch(processes, seed=9)  # never ends by itself
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "error: killed by the second interrupt; nothing was saved\n"
    assert gone(process.training, timeout=5)


def test_training_saves_and_ends_where_the_launcher_is_killed(launch):
    process = launch(1, seed=42)
    process.kill()
    assert gone(process.training, timeout=10)
    assert process.stdout.read() == "saved SIGTERM\n"


def test_a_signal_before_anything_trains_ends_all_of_it(launch):
    process = launch(2, seed=42, running=0)
    while not process.stdout.readline().startswith("$"):
        pass
    while not psutil.Process(process.pid).children():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 75 and out == ""
    assert err == "stopped before training began\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_models_load_is_a_stop_too(launch, processes):
    process = launch(processes, seed=8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err.endswith("stopped before training began\n")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("seed", "status", "error"), [(0, 0, ""), (2, 2, "error: data: of no use\n")]
)
def test_statuses_of_an_orderly_end(launch, processes, seed, status, error):
    process = launch(processes, seed)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, error)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bug_keeps_its_traceback_and_ends_with_status_1(launch, processes):
    process = launch(processes, seed=1, running=1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "RuntimeError: a bug" in err


def test_a_process_that_is_killed_is_told(launch):
    process = launch(1, seed=9)
    process.training[0].kill()
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert err == "error: the training process was killed by SIGKILL\n"
