"""Training in several processes: what is shared out, what is exchanged, and how a run ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "tests/train_for_tests.py"
SMALL = {
    "num_epochs": 1,
    "eval_interval": 0,
    "rank_timeout": 20,
    "sample.batch_size": 1,
    "sample.num_steps": 8,
    "sample.branch_from": 2,  # 6 comparisons of each prompt, the scorer's calls
    "sample.threshold": 0.0,
    "preference.scorer": "tests.scorers_for_tests:on_ranks",
}
CONFIG = "--config=tests/data/random_models.py"
RANKS = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]


def arguments(folder, scorer=None, **overrides):
    """The config of a run in `folder`/run, as arguments."""
    overrides = {name.replace("__", "."): value for name, value in overrides.items()}
    values = SMALL | {"logdir": folder, "run_name": "run"} | overrides
    values["preference.kwargs"] = {"notes": str(folder), **(scorer or {})}
    return [CONFIG, *(f"--config.{key}={value}" for key, value in values.items())]


def start(command):
    env = {key: value for key, value in os.environ.items() if key not in RANKS}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_launcher(count, *options):
    return start(["-m", "spo.launch", "--cpu", f"--num_processes={count}", SCRIPT, *options])


def launch(count, *options):
    """Run to the end under the launcher; its status and what it said on stderr."""
    process = start_launcher(count, *options)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics_of(folder, key):
    return [line[key] for line in read_lines(folder / "run" / "metrics.jsonl")]


def prompts_of(folder, count):
    lines = [(folder / f"prompts_{rank}.txt").read_text().splitlines() for rank in range(count)]
    return Counter(prompt for part in lines for prompt in part)


@pytest.mark.slow
def test_four_processes_some_without_valid_pairs(tmp_path):
    """Uneven and missing pairs, then fewer pairs than processes; all hold the same weights."""
    # Of 6 + 6 comparisons rank 0 has a pair in 7, rank 1 in none, rank 2 in 3, rank 3 in 6.
    options = {"prompts__num": 8, "train__batch_size": 2}
    status, err = launch(4, *arguments(tmp_path, {"ties": (8, 1, 4, 7)}, **options))
    assert status == 0, err
    assert metrics_of(tmp_path, "pairs") == [15, 1]
    assert metrics_of(tmp_path, "pairs_left_over") == [3, 1]
    assert metrics_of(tmp_path, "minibatches") == [2, 0]
    assert metrics_of(tmp_path, "updates") == [2, 0]
    counts = prompts_of(tmp_path, 4)
    assert len(counts) == 8 and set(counts.values()) == {1}

    notes = [read_lines(tmp_path / f"rank_{rank}.jsonl") for rank in range(4)]
    deals = [[line for line in rank if "share" in line] for rank in notes]
    assert [[deal["own"] for deal in rank] for rank in deals] == [[6, 1], [0, 0], [3, 0], [6, 0]]
    assert all([deal["share"] for deal in rank] == [3, 0] for rank in deals)
    for deal in (deal for rank in deals for deal in rank):
        assert deal["sent_bytes"] <= deal["own_bytes"]  # each pair moves once at most
    weights = [[line["weights"] for line in rank if "weights" in line] for rank in notes]
    assert len(set(weights[0])) == 2
    assert weights[0] == weights[1] == weights[2] == weights[3]


@pytest.mark.slow
def test_two_processes_see_every_prompt_once_and_lose_what_one_loses(tmp_path):
    sizes = {"sample__global_batch_size": 2, "train__global_batch_size": 6, "num_epochs": 2}
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        options = arguments(tmp_path / str(count), prompts__num=5, **sizes)
        status, err = launch(count, *options)
        assert status == 0, err
        counts = prompts_of(tmp_path / str(count), count)
        assert len(counts) == 5 and set(counts.values()) == {2}
    one, two = tmp_path / "1", tmp_path / "2"
    assert metrics_of(one, "pairs") == metrics_of(two, "pairs") == [12, 12, 6] * 2
    assert metrics_of(one, "loss") == pytest.approx(metrics_of(two, "loss"), rel=1e-3)
    notes = [read_lines(two / f"rank_{rank}.jsonl") for rank in range(2)]
    weights = [[line["weights"] for line in rank if "weights" in line] for rank in notes]
    assert len(set(weights[0])) == len(weights[0]) == 10 and weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "dead"), [(2, 0), (2, 1), (3, 1), (3, 2)])
def test_a_killed_rank_ends_the_other_with_a_line(tmp_path, count, dead):
    scorer = {"event": "kill", "rank": dead, "at": 8}  # in the second rollout
    status, err = launch(count, *arguments(tmp_path, scorer, prompts__num=2 * count))
    assert status == 1 and "Traceback" not in err and "Warning" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: rank {dead} ({os.uname().nodename}, pid ")
    assert " was killed by SIGKILL; this run stops" in error


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_other_with_its_error(tmp_path):
    scorer = {"event": "raise", "rank": 1, "at": 2}
    status, err = launch(2, *arguments(tmp_path, scorer, prompts__num=4))
    assert status == 1 and err.count("Traceback") == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert error.startswith("error: rank 1 (")
    assert " failed (exit code 1): RuntimeError: out of luck; this run stops" in error


@pytest.mark.slow
def test_a_silent_rank_ends_the_other_after_the_timeout(tmp_path):
    scorer = {"event": "pause", "rank": 1, "at": 2}
    options = arguments(tmp_path, scorer, prompts__num=4, rank_timeout=5)
    status, err = launch(2, *options)
    assert status == 1
    (error,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert error.startswith("error: rank 0 (") and "5000ms" in error


def test_a_signal_to_the_launcher_saves_and_the_run_resumes(tmp_path):
    # 12 rollouts: a signal after the first one comes in time on a busy machine, too.
    options = {"prompts__num": 24, "train__batch_size": 2}
    process = start_launcher(2, *arguments(tmp_path, **options))
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    (line,) = [line for line in err.splitlines() if line.startswith("stopped:")]
    assert line.startswith(f"stopped: by a signal; everything is in {tmp_path}/run/checkpoints/")
    assert "Traceback" not in err and "error" not in err
    status, err = launch(2, *arguments(tmp_path, resume_from="auto", **options))
    assert status == 0, err
    assert metrics_of(tmp_path, "pairs") == [12] * 12
    notes = [read_lines(tmp_path / f"rank_{rank}.jsonl") for rank in range(2)]
    weights = [[line["weights"] for line in rank if "weights" in line] for rank in notes]
    assert weights[0] == weights[1]


def test_bad_data_that_one_rank_meets_is_one_line_of_the_run(tmp_path):
    scorer = {"event": "refuse", "rank": 1, "at": 2}
    status, err = launch(2, *arguments(tmp_path, scorer, prompts__num=4))
    assert status == 2
    assert [line for line in err.splitlines() if "error" in line.lower()] == [
        "error: data: of no use"
    ]
    assert "Traceback" not in err


def train_on_two_machines(*options):
    """Two launchers, as on two machines, both on this one."""
    place = ["--cpu", "--num_processes=2", "--num_machines=2", "--main_process_ip=127.0.0.1"]
    place.append(f"--main_process_port={free_port()}")
    machines = [
        start(["-m", "spo.launch", *place, f"--machine_rank={rank}", SCRIPT, *options])
        for rank in range(2)
    ]
    for machine in machines:
        _, err = machine.communicate(timeout=300)
        assert machine.returncode == 0, err


@pytest.mark.slow
def test_two_machines_train_and_resume(tmp_path):
    options = {"prompts__num": 4, "train__batch_size": 6}
    train_on_two_machines(*arguments(tmp_path, **options))
    more = {"num_epochs": 2, "resume_from": "auto", **options}
    train_on_two_machines(*arguments(tmp_path, **more))
    assert metrics_of(tmp_path, "epoch") == [1, 1, 2, 2]
    assert metrics_of(tmp_path, "pairs") == [12] * 4
    assert set(prompts_of(tmp_path, 2).values()) == {2}
    notes = [read_lines(tmp_path / f"rank_{rank}.jsonl") for rank in range(2)]
    weights = [[line["weights"] for line in rank if "weights" in line] for rank in notes]
    assert len(weights[0]) == 4 and weights[0] == weights[1]
