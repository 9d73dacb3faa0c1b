"""A run directory has one name, one run at a time, and tells who has it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spo.errors import UserError
from spo.run.checkpoint_folder import new_checkpoint
from spo.run.folder import locked, run_folder
from spo.run.resume import find_checkpoint
from spo.run.session import open_run_dir
from tests import small_runs

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from spo.run.folder import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def in_use(process):
    return f"^run_name: .*/run is in use by process {process.pid} on {os.uname().nodename}; wait "


def test_a_folder_has_one_holder_until_it_dies(holder, tmp_path):
    for _ in range(2):  # who asks changes nothing
        with pytest.raises(UserError, match=in_use(holder)) as error, locked(tmp_path / "run"):
            pass
        assert "\n" not in str(error.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    for _ in range(2):
        with locked(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / ".lock_holder").read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


def test_a_second_start_writes_nothing(holder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=in_use(holder)):
        small_runs.run(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", ".lock_holder"]


@pytest.mark.parametrize("resume_from", ["", "auto"])
def test_a_run_that_came_and_went_between_check_and_lock(tmp_path, resume_from):
    before = find_checkpoint(tmp_path, tmp_path.name, resume_from)
    with open_run_dir(tmp_path, {}, before):
        pass
    with new_checkpoint(tmp_path, "epoch_0001", 0):
        pass
    with (
        pytest.raises(UserError, match="^run_name: another run"),
        open_run_dir(tmp_path, {}, before),
    ):
        pass
    now = find_checkpoint(tmp_path, tmp_path.name, "auto")
    with open_run_dir(tmp_path, {}, now):
        pass


def test_names_of_the_same_second_differ(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20261122_101500")
    names = {run_folder("runs", "", "gradspo", "sd15").name for _ in range(20)}
    assert len(names) > 18
    assert all(name.startswith("gradspo_sd15_20261122_101500_") for name in names)


@pytest.mark.parametrize("name", ["a", "lr=1e-4", "my run (2)", "größer", "a" * 200, "v1.0"])
def test_plain_names(name):
    assert run_folder("~/runs", name, "gradspo", "sd15") == Path.home() / "runs" / name


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", ".hidden", "a/b", "/tmp/a", "../a", "a/..", "a/", "a\\b", "C:\\a", "-rf", " "),
        *("a\0b", "a\nb", "a\tb", "a ", "a\x1b[2J", "a\udcff", "a\u202eb", "a" * 201, "ä" * 101),
    ],
)
def test_names_that_are_no_plain_name(name):
    with pytest.raises(UserError, match="^run_name: .* is not a plain name"):
        run_folder("runs", name, "gradspo", "sd15")
