"""The table of downloads: complete, and what the Hub says of each."""

import re
import runpy

import huggingface_hub
import pytest
from fake_hub import serve
from test_config import ROOT

from spo.command_line.config_files import leaves, load_config
from spo.costs import downloads
from spo.costs.downloads import PAIRS, WEIGHTS, Download, ask, describe, is_cached, prompt_lists
from spo.data.prompt_sets import PROMPT_SETS
from spo.hub import is_hub_id
from spo.scorers import SCORERS, image_scorer, named_files

base_of = runpy.run_path(str(ROOT / "scripts" / "prefetch.py"))["base_of"]
KNOWN = {row.source.removeprefix("datasets/") for row in (*WEIGHTS, *PAIRS)}
FILES = {(row.source, file) for row in WEIGHTS for file in row.files}


def sources_in(values):
    """Returns the Hub ids, and hf:// files, among the texts of a config."""
    for value in values:
        is_name = isinstance(value, str) and not (ROOT / value).exists()
        if is_name and (value.startswith("hf://") or is_hub_id(value)):
            yield value


def test_every_default_config_and_scorer_is_in_the_table():
    found = set()
    for path in sorted((ROOT / "config").rglob("*.py")):
        if path.name != "__init__.py":
            config = load_config(str(path), base_of)
            found |= set(sources_in(leaves(config).values()))
            if "models" in config or "data" not in config:
                assert (
                    config.prompts.source in PROMPT_SETS or (ROOT / config.prompts.source).exists()
                )
    for name in SCORERS:
        found |= set(sources_in(named_files(image_scorer(name, {})).values()))
    assert len(found) >= 12
    for source in found:
        if source.startswith("hf://"):
            user, repo, file = source.removeprefix("hf://").split("/", 2)
            own = {name for row, name in FILES if row == f"{user}/{repo}"}
            networks = {n.split("/")[1] for n in own if n.startswith(f"{file}/")}
            assert file in own or networks >= {"unet", "text_encoder"}
        else:
            assert source in KNOWN


def test_the_official_list_has_three_places_of_one_checksum():
    places = PROMPT_SETS["official-4k"].places
    assert len({place.source.partition("#")[0] for place in places}) == 3
    assert {place.source.partition("#sha256=")[2] for place in places} == {
        "804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4"
    }
    assert all(
        re.match(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/", p.source)
        for p in places
    )


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = huggingface_hub.constants
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        hub.create("user/model", files={"a.bin": b"x" * 20_000_000, "b.bin": b""})
        yield hub


MODEL = Download("user/model", ("a.bin",), 0.02, "mit", "a test")


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        (None, "yes, 0.02 GB"),
        ("moved", "yes, 0.02 GB, moved to moved/repo"),
        (404, "not found (404): there is no such public repo"),
        (403, "gated: accept the terms at "),
        ("timeout", "no answer from the Hub ("),
    ],
)
def test_what_the_hub_says(hub, fault, answer):
    hub.broken = {"user/model": fault} if fault else {}
    assert ask(MODEL).startswith(answer)


def test_a_file_that_is_not_in_the_repo(hub):
    assert ask(Download("user/model", ("c.bin",), 1, "", "")) == "no c.bin in it"


def test_an_address_is_asked_for_its_size(hub):
    hub.web["/web/list.json"] = b"x" * 400_000
    address = Download(f"{hub.url}/web/list.json#sha256=00", (), 0, "", "")
    assert ask(address) == "yes, 0.4 MB"
    hub.web.clear()
    assert ask(address) == "not found (404)"
    assert not is_cached(address)


def test_a_row_says_whether_it_is_cached(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "WEIGHTS", (MODEL,))
    assert describe(check=False).splitlines()[1].split()[2] == "no"
    snapshot = tmp_path / "cache" / "models--user--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "a.bin").touch()
    rows = describe(check=False).splitlines()
    assert rows[1].split()[:3] == ["0.02", "mit", "yes"]
    assert rows[1].endswith("user/model: a.bin")
    assert len(rows) == 1 + 1 + len(PAIRS) + len(list(prompt_lists()))
