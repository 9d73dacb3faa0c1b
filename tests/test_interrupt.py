"""Signals: the first asks, a second SIGINT kills; the command line tells it by status 75."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from spo.errors import Stopped
from spo.launch.signals import StopSignals

ROOT = Path(__file__).resolve().parent.parent
WAITS = """
import time
from spo.launch.signals import StopSignals

with StopSignals() as signals:
    print("ready", flush=True)
    while not signals.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


def test_a_signal_asks_and_the_handlers_come_back():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as signals:
        signals.check()
        seen = []
        with pytest.raises(Stopped):
            for item in signals.watch(range(3)):
                seen.append(item)
                os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [0] and signals.requested
        os.kill(os.getpid(), signal.SIGTERM)  # launchers send it more than once
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def work():
        with StopSignals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigint_stops_at_once(first):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    if first == signal.SIGTERM:  # that was the first SIGINT
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.3)
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_line_says_it_in_one_line_with_status_75(tmp_path, number):
    command = [sys.executable, "train_sd15.py", "--config=tests/data/random_models.py"]
    command += [f"--config.logdir={tmp_path}", "--config.run_name=run", "--config.eval_interval=0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75
    line = stderr.splitlines()[-1]
    assert line.startswith(f"stopped: by a signal; everything is in {tmp_path}/run/checkpoints/")
    assert line.endswith("--config.run_name=run --config.resume_from=auto goes on.")
    assert "Traceback" not in stderr
