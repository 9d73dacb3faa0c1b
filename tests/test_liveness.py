"""Ranks that are killed, stopped, hang or fail: the others stop in bounded time and name them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 3  # seconds of silence
SOON = 6.0  # seconds in which a death or failure has ended all others, on a busy machine, too


@pytest.fixture
def group(tmp_path):
    """Four ranks, without torchrun, which would end the others by itself."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rank_for_tests", str(rank), "4", str(TIMEOUT), tmp_path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n", rank.communicate()[1]
    yield ranks
    for rank in ranks:
        rank.kill()
        rank.communicate()


def say(rank, text):
    rank.stdin.write(text + "\n")
    rank.stdin.flush()


def assert_stopped(ranks, within, cause):
    """Every one of `ranks` ends with status 1 and one line that begins with `cause`."""
    end = time.monotonic() + within
    for rank in ranks:
        assert rank.wait(timeout=max(0.01, end - time.monotonic())) == 1
        error = rank.stderr.read().strip()
        assert error.startswith(f"error: {cause}") and "\n" not in error
        assert "resume_from=auto" in error


@pytest.mark.parametrize("dead", [0, 2])
def test_a_killed_rank_ends_the_others_at_once(group, dead):
    killed = group.pop(dead)
    killed.kill()
    name = f"rank {dead} ({os.uname().nodename}, pid {killed.pid})"
    assert_stopped(group, SOON, f"{name} ended without a word")


@pytest.mark.parametrize("silent", [0, 3])
def test_a_rank_that_hangs_ends_the_others_after_the_timeout(group, silent):
    stopped = group.pop(silent)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(TIMEOUT / 2)
    assert all(rank.poll() is None for rank in group)
    cause = (
        f"rank {silent} ({os.uname().nodename}, pid {stopped.pid}) has not been heard of for 3 s"
    )
    try:
        assert_stopped(group, 1 + SOON, cause)
    finally:
        stopped.kill()  # paused, it would stay for ever


@pytest.mark.parametrize("broken", [0, 1])
def test_the_failure_of_a_rank_ends_the_others_and_is_told(group, broken):
    failing = group.pop(broken)
    say(failing, "fail RuntimeError: something broke")
    name = f"rank {broken} ({os.uname().nodename}, pid {failing.pid})"
    assert_stopped(group, SOON, f"{name}: RuntimeError: something broke; ")
    # Its own exception goes on, for its traceback.
    assert failing.wait(timeout=SOON) == 3 and failing.stderr.read() == ""


@pytest.mark.parametrize("dead", [0, 1])
def test_a_death_is_named_and_not_the_errors_that_it_causes(group, dead):
    killed = group.pop(dead)
    for rank in group:
        say(rank, "fail RuntimeError: connection closed by peer")
    time.sleep(0.5)  # the errors arrive first
    killed.kill()
    assert_stopped(group, SOON, f"rank {dead} ({os.uname().nodename}, pid {killed.pid}) ended")


def test_ranks_that_leave_one_after_the_other_end_nobody(group):
    for leaving in (group[1], group[0], group[3], group[2]):
        say(leaving, "leave")
        assert leaving.wait(timeout=SOON) == 0
        time.sleep(0.7 * TIMEOUT)  # the second is later than any timeout
    assert [rank.stderr.read() for rank in group] == [""] * 4


def test_pauses_and_calls_that_hold_the_lock_for_less_than_the_timeout_end_nobody(group):
    say(group[0], "hold 1")
    say(group[2], "hold 1")
    time.sleep(TIMEOUT + 1)
    # A machine that sleeps, or a container that is frozen, stops all of them.
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in group:
            rank.send_signal(number)
        time.sleep(TIMEOUT + 1)
    for rank in group:
        assert rank.poll() is None
        say(rank, "leave")
        assert rank.wait(timeout=SOON) == 0
