"""Trackers: what they are given, and how wandb is chosen to be offline."""

import json

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
