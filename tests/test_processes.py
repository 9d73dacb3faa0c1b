"""The launcher's processes: signals reach them, and their end is told in a line and a status."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from spo.launch.processes import _tell

ROOT = Path(__file__).resolve().parents[1]

# Like a training script, as far as signals and statuses go.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from spo.command_line.flags import exit_on_user_error
from spo.errors import Stopped, UserError
from spo.launch.processes import StopSignals

event, rank, last = sys.argv[1], os.environ.get("RANK", "0"), os.environ["LAST"]

def say(text):
    sys.stdout.write(text + "\\n")  # in one piece
    sys.stdout.flush()

with exit_on_user_error():
    if event == "load":
        say(f"training {os.getpid()}")
        time.sleep(60)
    with StopSignals() as signals:
        say(f"training {os.getpid()}")
        # torch kills the others when one ends in failure, even before they are here.
        here = Path(__file__).parent
        (here / f"rank_{rank}").touch()
        while len(list(here.glob("rank_*"))) <= int(last) and not signals.requested:
            time.sleep(0.01)
        if event == "end":
            sys.exit(0)
        if event == "status":
            sys.exit(7)
        if event == "bug" and rank == last:
            raise RuntimeError("a bug")
        if event == "refuse" and rank == last:
            raise UserError("data: of no use")
        while event == "forever" or not signals.requested:
            time.sleep(0.05)
        time.sleep(1)  # to save
        say("saved")
        raise Stopped("by a signal; all is saved.")
"""
LAUNCH = """
import sys
from spo.launch.processes import World, run_processes

count = int(sys.argv[1])
sys.exit(run_processes([sys.executable, *sys.argv[2:]], World(count, count)))
"""


@pytest.fixture
def launch(tmp_path):
    """A function that launches the script and returns when `running` of its processes train."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started = []

    def launch(processes, event):
        arguments = [str(processes), str(script), event]
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "LAST": str(processes - 1)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        process.training = []
        for _ in range(processes):
            line = process.stdout.readline()
            while not line.startswith("training"):
                assert line, process.communicate()
                line = process.stdout.readline()
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended already
                process.training.append(psutil.Process(int(line.split()[1])))
        return process

    yield launch
    for process in started:
        for child in [*process.training, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate()


def gone(processes, timeout):
    return not psutil.wait_procs(processes, timeout=timeout)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_a_signal_to_the_launcher_lets_the_training_save(launch, processes, number):
    process = launch(processes, "train")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out.splitlines() == ["saved"] * processes
    assert err == "stopped: by a signal; all is saved.\n"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_interrupt_kills_everything_at_once(launch, processes):
    process = launch(processes, "forever")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "error: killed by the second interrupt; nothing was saved\n"
    assert gone(process.training, timeout=5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_while_models_load_is_a_stop_too(launch, processes):
    process = launch(processes, "load")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert err == "stopped outside of training; nothing is lost\n"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("event", "status", "error"), [("end", 0, ""), ("refuse", 2, "error: data: of no use\n")]
)
def test_statuses_of_an_orderly_end(launch, processes, event, status, error):
    process = launch(processes, event)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (status, error)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_bug_is_told_with_its_rank_and_one_traceback(launch, processes):
    process = launch(processes, "bug")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("Traceback") == 1
    *_, line = err.splitlines()
    if processes == 1:
        assert line == "RuntimeError: a bug"
    else:
        assert line.startswith(f"error: rank 1 ({os.uname().nodename}, pid ")
        assert ") failed (exit code 1): RuntimeError: a bug; " in line


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_is_killed_is_told(launch, processes):
    process = launch(processes, "train")
    pid = process.training[-1].pid
    process.training[-1].kill()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and err.strip().count("\n") == 0
    assert f"({os.uname().nodename}, pid {pid}) was killed by SIGKILL; this run stops" in err
    assert gone(process.training, timeout=5)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_launcher_that_is_killed_lets_the_training_save(launch, processes, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    process = launch(processes, "train")
    process.kill()
    assert gone(process.training, timeout=20)
    out, _ = process.communicate()
    assert out.splitlines() == ["saved"] * processes
    # What it left is deleted by the next one.
    launch(processes, "end").communicate(timeout=60)
    assert list((tmp_path / "temporary").glob("spo_*")) == []


@pytest.mark.slow
def test_another_status_is_kept(launch):
    process = launch(2, "status")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert ") failed (exit code 7): no error is known; " in err


def failure(folder, rank, exitcode, text="", when=0.0):
    """The failure of a process, with an error of `text` written at second `when` if there is one."""
    file = folder / f"{rank}.json"
    if text:
        extra = {"py_callstack": f"Traceback of {rank}\n", "timestamp": str(int(when))}
        file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
        os.utime(file, (when, when))
    made = ProcessFailure(rank, 100 + rank, exitcode, str(file))
    if not text:
        made.timestamp = int(when)
    return made


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        # Errors of one second, noticed together.
        ((1, "RuntimeError: lost", 5.4), (1, "ValueError: cause", 5.3), "ValueError: cause"),
        # A death, noticed after the error that it caused.
        ((1, "RuntimeError: lost", 5.9), (-9, "", 6.1), "killed by SIGKILL"),
        # A process that did not listen to torch's SIGTERM yet, or died of the lost connection.
        ((-15, "", 5.5), (1, "ValueError: cause", 5.3), "ValueError: cause"),
        ((-6, "", 5.5), (1, "ValueError: cause", 5.3), "ValueError: cause"),
    ],
)
def test_the_cause_is_told_and_not_what_follows(tmp_path, capsys, first, second, told):
    failures = {0: failure(tmp_path, 0, *first), 1: failure(tmp_path, 1, *second)}
    assert _tell(failures, stopping=False) == 1
    err = capsys.readouterr().err
    assert f"error: rank 1 ({os.uname().nodename}, pid 101) " in err and told in err
    assert "lost" not in err and "Traceback of 0" not in err


def test_a_stop_that_was_saved_counts_whatever_follows(tmp_path, capsys):
    stopped = failure(tmp_path, 1, 75, "Stopped: by a signal.", 5.3)
    lost = failure(tmp_path, 0, 1, "RuntimeError: lost", 5.4)
    assert _tell({0: lost, 1: stopped}, stopping=True) == 75
    assert capsys.readouterr().err == "stopped: by a signal.\n"
