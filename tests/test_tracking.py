"""Trackers: what they are given, and how wandb is chosen to be offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from PIL import Image

from spo.run import tracking
from spo.run.tracking import Tracking, has_wandb_key


def test_metrics_file_keeps_what_trackers_cannot_take(tmp_path):
    run = Tracking(tmp_path, "none", "project", {})
    run.log({"loss": 0.5, "ema_distance": None, "pairs_at": {"751": 8}}, step=1)
    run.log({"loss": None}, step=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"loss": 0.5, "ema_distance": None, "pairs_at": {"751": 8}}, {"loss": None}]
    assert tracking._flat(lines[0]) == {"loss": 0.5, "pairs_at/751": 8}
    run.picture("validation/epoch_0001", Image.new("RGB", (3, 2), "red"), step=1)
    assert Image.open(tmp_path / "validation" / "epoch_0001.png").size == (3, 2)


@pytest.mark.parametrize(
    ("key", "netrc", "found"),
    [
        ("", "", False),
        ("abc", "", True),
        ("", "machine api.wandb.ai login user password abc\n", True),
        ("", "machine example.org login user password abc\n", False),
        ("", "not a netrc file", False),
    ],
)
def test_a_wandb_key_is_looked_for_where_wandb_keeps_it(tmp_path, monkeypatch, key, netrc, found):
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert has_wandb_key() == found


def test_wandb_without_a_key_runs_offline_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    PartialState()  # accelerate's trackers ask it which process they are on
    run = Tracking(tmp_path, "wandb", "project", {"train": {"beta": 10.0}})
    run.log({"loss": 0.5, "ema_distance": None}, step=1)
    run.picture("validation/epoch_0001", Image.new("RGB", (3, 2), "red"), step=1)
    run.close()
    assert capsys.readouterr().out.startswith("wandb: offline, no API key is set")
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


ROOT = Path(__file__).resolve().parent.parent
HIDE = """
from importlib.machinery import PathFinder
own = PathFinder.find_spec
hidden = lambda cls, name, *rest: None if name in {} else own(name, *rest)
PathFinder.find_spec = classmethod(hidden)
"""


def without(packages, folder, *command):
    """Runs a command in which packages seem not to be installed."""
    (folder / "sitecustomize.py").write_text(HIDE.format(packages))
    env = os.environ | {"PYTHONPATH": f"{folder}:{ROOT}:{ROOT}/tests", "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_without_a_tracker_a_run_needs_no_wandb(tmp_path):
    code = f"""
from importlib.util import find_spec
from pathlib import Path
from tests.small_runs import run
assert find_spec("wandb") is None and find_spec("peft")
run(Path("{tmp_path}/run"), num_epochs=1, eval_interval=0, tracker__name="none")
"""
    result = without(["wandb", "datasets", "open_clip"], tmp_path, sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_python_of_ones_own_needs_only_what_a_run_imports(tmp_path):
    command = ("bash", "scripts/setup_env.sh")
    result = without(["wandb", "datasets", "open_clip"], tmp_path, *command)
    assert (result.returncode, result.stdout) == (0, f"{sys.executable}\n")
    for hidden, more in (["peft", "wandb"], []), (["peft"], ["peft"]):
        result = without(hidden, tmp_path, *command, *more)
        assert result.returncode == 2 and " lacks peft" in result.stderr
