"""A run directory has one name, one run at a time, and tells who has it."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spo.errors import RunError, UserError
from spo.run.checkpoint_folder import best, checkpoints, link_best, new_checkpoint
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


def refuse(*_, **options):
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.fixture(params=["links", "no links"])
def saved(request, tmp_path, monkeypatch):
    """Saves the checkpoint of an epoch, with a limit of 2; returns the epochs that are left."""
    if request.param == "no links":
        monkeypatch.setattr(os, "symlink", refuse)

    def save(epoch):
        with new_checkpoint(tmp_path, f"epoch_{epoch:04d}", 2) as folder:
            (folder / "x").write_text(str(epoch))
        return [int(folder.name[-4:]) for folder in checkpoints(tmp_path)]

    save(1), save(2)
    return save


def test_the_best_checkpoint_is_kept_besides_the_limit(saved, tmp_path):
    first, second = checkpoints(tmp_path)
    assert best(tmp_path) is None
    link_best(tmp_path, second)
    assert best(tmp_path) == second
    assert [saved(epoch) for epoch in (3, 4, 5)] == [[2, 3], [2, 3, 4], [2, 4, 5]]
    link_best(tmp_path, tmp_path / "checkpoints" / "epoch_0004")
    assert saved(6) == [4, 5, 6]
    (best(tmp_path) / "x").write_text("5")
    assert best(tmp_path) is None  # damaged, and still not deleted
    assert saved(7) == [4, 6, 7]
    for _ in range(2):
        link_best(tmp_path, None)
    assert saved(8) == [7, 8] and not os.path.lexists(tmp_path / "best")
    link_best(tmp_path, first)  # deleted long ago
    assert best(tmp_path) is None


def test_best_is_a_relative_link_or_says_the_same(saved, tmp_path, monkeypatch):
    first, second = checkpoints(tmp_path)
    link, target = tmp_path / "best", "checkpoints/epoch_0001"
    link_best(tmp_path, first)
    said = os.readlink(link) if link.is_symlink() else link.read_text()
    assert said.strip() == target
    monkeypatch.setattr(os, "replace", refuse)  # until the last step nothing has changed
    with pytest.raises(RunError, match="cannot write .*/best: Operation not permitted"):
        link_best(tmp_path, second)
    assert best(tmp_path) == first


def test_a_copy_in_which_best_is_a_folder(tmp_path):
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    run_dir.mkdir()
    with new_checkpoint(run_dir, "epoch_0001", 0):
        pass
    link_best(run_dir, checkpoints(run_dir)[0])
    shutil.copytree(run_dir, copy)  # follows links
    assert best(copy) == copy / "best"
    link_best(copy, checkpoints(copy)[0])
    assert best(copy) == copy / "checkpoints" / "epoch_0001"


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
