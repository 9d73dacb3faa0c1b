"""A disk that is full, read-only or gone, half lines, and a tracker that is down."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from spo import atomic as durable
from spo.errors import RunError
from spo.method import checkpoint
from spo.run import tracking
from spo.run.checkpoint_folder import checkpoints, find_fault, new_checkpoint, write_state
from spo.run.folder import drop_metrics_after, record_start
from spo.run.tracking import Tracking
from tests.small_runs import ROOT, run


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(run_dir, name, size):
    with new_checkpoint(run_dir, name, limit=1) as folder:
        save_file({"x": torch.zeros(size, dtype=torch.uint8)}, folder / "x.safetensors")
        write_state(folder, {})


def test_a_full_disk_leaves_the_checkpoint_before(small_disk):
    run_dir = small_disk / "run"
    run_dir.mkdir()
    fill(run_dir, "epoch_0001", 600_000)
    message = r"cannot write .*epoch_0002: .*No space left on device"
    with pytest.raises(RunError, match=message):
        fill(run_dir, "epoch_0002", 600_000)
    (left,) = (run_dir / "checkpoints").iterdir()
    assert left.name == "epoch_0001" and find_fault(left) is None
    with pytest.raises(RunError, match="cannot write .*/metrics.jsonl: .*No space left on"):
        log = Tracking(run_dir, "none", "project", {})
        log.log({"filler": "x" * 600_000}, step=1)
    # Half a line may be there; who goes on cuts it off.
    drop_metrics_after(run_dir, 1)
    assert (run_dir / "metrics.jsonl").read_text() == ""


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_run_whose_disk_fills_up_goes_on_later(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    folder, own, saves = tmp_path / "run", checkpoint.save_file, []

    def full_later(*arguments):
        saves.append(arguments)
        return no_space() if len(saves) == 4 else own(*arguments)  # in the second checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full_later)
        with pytest.raises(RunError, match="epoch_0002: No space left on device.*resume_from=auto"):
            run(folder, eval_interval=0)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["epoch_0001"]
    run(folder, eval_interval=0)
    assert [p.name for p in checkpoints(folder)] == ["epoch_0001", "epoch_0002"]


def test_nothing_is_deleted_before_the_newest_is_on_the_disk(tmp_path, monkeypatch):
    fill(tmp_path, "epoch_0001", 10)
    monkeypatch.setattr(durable.os, "fsync", no_space)
    with pytest.raises(RunError, match="epoch_0002: .*No space left on"):
        fill(tmp_path, "epoch_0002", 10)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["epoch_0001"]
    assert find_fault(checkpoints(tmp_path)[0]) is None
    fill(tmp_path, "epoch_0002", 10)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["epoch_0002"]


def test_a_run_directory_that_vanished_is_an_error_and_not_made_anew(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = Tracking(run_dir, "none", "project", {})
    shutil.rmtree(run_dir)
    with pytest.raises(RunError, match="cannot write .*/metrics.jsonl: No such file or directory;"):
        log.log({"loss": 0.5}, step=1)
    with pytest.raises(RunError, match="cannot write .*policy.png: No such file or directory;"):
        log.picture("validation/epoch_0001_policy", Image.new("RGB", (3, 2)), step=1)
    with pytest.raises(RunError, match="cannot write .*/epoch_0001: No such file or directory;"):
        fill(run_dir, "epoch_0001", 10)
    assert not run_dir.exists()


def test_half_lines_are_cut_off(tmp_path):
    metrics, starts = tmp_path / "metrics.jsonl", tmp_path / "starts.jsonl"
    lines = ['{"rollout": 1}', "\0\0\0", '{"rollout": 2}', '{"rollout": 3}']
    metrics.write_text("\n".join(lines) + '\n{"rollout": 2, "lo')
    drop_metrics_after(tmp_path, 2)
    assert metrics.read_text() == '{"rollout": 1}\n{"rollout": 2}\n'
    starts.write_text('{"resumed_from": ""}\n{"resumed_fr')
    record_start(tmp_path, {"resumed_from": "epoch_0001"})
    found = [json.loads(line)["resumed_from"] for line in starts.read_text().splitlines()]
    assert found == ["", "epoch_0001"]


class Down:
    """A tracker whose calls fail from the one named `since` on."""

    def __init__(self, since):
        self.since, self.calls = since, []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append(name)
            if name == self.since:
                raise ConnectionError("the line is dead\nas a door nail")

        return call


@pytest.mark.parametrize(
    "since", ["start", "store_init_configuration", "log", "log_images", "finish"]
)
def test_a_tracker_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch, capsys, since):
    tracker = Down(since)

    monkeypatch.setattr(tracking, "_make_tracker", lambda *arguments: tracker)
    log = Tracking(tmp_path, "wandb", "project", {"seed": 1})
    for step in (1, 2):
        log.log({"loss": 0.5}, step=step)
        log.picture(f"validation/epoch_{step}", Image.new("RGB", (3, 2)), step=step)
    log.close()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith("tracker: it failed (ConnectionError: the line is dead); going on")
    assert tracker.calls.index(since) == len(tracker.calls) - 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "validation").iterdir())) == 2
