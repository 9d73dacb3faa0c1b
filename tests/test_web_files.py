"""Files by their address: checked, kept, downloaded once."""

import hashlib
import json
import threading
import time
from dataclasses import replace

import pytest
from fake_hub import serve

from spo.data import prompts, web_files
from spo.data.prompts import read_prompts
from spo.data.web_files import fetch, kept
from spo.errors import Unavailable, UserError

CONTENT = json.dumps([{"caption": "a fox"}, {"caption": "a bear"}]).encode()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A web server that serves CONTENT at /web/list.json, and an empty cache."""
    monkeypatch.setattr(web_files.constants, "HF_ASSETS_CACHE", tmp_path / "assets")
    monkeypatch.setattr(web_files.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    with serve() as hub:
        hub.web["/web/list.json"] = CONTENT
        hub.address = f"{hub.url}/web/list.json"
        yield hub


@pytest.mark.parametrize("end", ["", f"#sha256={SHA256}"])
def test_an_address_is_a_source_of_prompts_and_read_once(web, monkeypatch, end):
    assert read_prompts(web.address + end).prompts == ("a fox", "a bear")
    monkeypatch.setattr(web_files.constants, "HF_HUB_OFFLINE", True)
    found = read_prompts(web.address + end, num=1)
    assert len(found.prompts) == 1 and web.address in found.describe()
    assert web.asked == ["GET /web/list.json"]


def test_mirrors_of_one_checksum_are_one_file(web):
    web.web["/other/list.json"] = CONTENT
    first = fetch(f"{web.address}#sha256={SHA256}").path
    assert fetch(f"{web.url}/other/list.json#sha256={SHA256}").path == first
    assert hashlib.sha256(first.read_bytes()).hexdigest() == SHA256
    assert len(web.asked) == 1


def test_content_that_has_changed_is_not_taken(web):
    address = f"{web.address}#sha256={SHA256}"
    path = fetch(address).path
    path.write_bytes(b"[]")  # damaged on this disk: downloaded again
    assert kept(address) is None
    assert fetch(address).path.read_bytes() == CONTENT
    path.unlink()
    web.web["/web/list.json"] = b"[]"
    with pytest.raises(Unavailable, match=f"changed content .its sha256 is 4f53.*be {SHA256}"):
        fetch(address)
    assert not path.exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, r": not found \(404\)"),
        (410, r"not found \(410\)"),
        (401, r"refused \(401\); open it in a browser"),
        (403, r"refused \(403\)"),
        (500, "answers with status 500"),
        ("timeout", r"no answer \(timed out\); is there a network"),
    ],
)
def test_what_a_server_answers_is_one_line(web, fault, message):
    web.broken["list.json"] = fault
    with pytest.raises(UserError, match=f"^prompts.source: {web.address}.*{message}") as caught:
        read_prompts(web.address)
    assert "\n" not in str(caught.value)


def test_a_redirect_is_followed_and_told(web):
    web.broken["list.json"] = "moved"
    found = read_prompts(web.address)
    assert found.prompts == ("a fox", "a bear")
    assert f"moved to {web.url}/web/moved/repo" in found.describe()


@pytest.mark.parametrize("end", ["#sha256=", "#sha256=12", "#md5=00", f"#sha256={SHA256[:-1]}g"])
def test_a_malformed_checksum(web, end):
    with pytest.raises(UserError, match="after # stands sha256= with 64 digits"):
        read_prompts(web.address + end)
    assert web.asked == []


def test_offline_without_the_file(web, monkeypatch):
    monkeypatch.setattr(web_files.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        read_prompts(web.address)


def test_a_file_that_is_too_large(web, monkeypatch):
    monkeypatch.setattr(web_files, "_LARGEST", 10)
    with pytest.raises(Unavailable, match="no list of prompts"):
        fetch(web.address)


def test_a_cache_that_cannot_be_written(web, tmp_path):
    (tmp_path / "assets").write_text("a file where the folder would be")
    with pytest.raises(UserError, match="cannot keep .*set HF_HOME to another folder"):
        read_prompts(web.address)


def test_one_downloads_and_the_others_wait(web, monkeypatch):
    opened = web_files.open_address

    def slowly(request):
        time.sleep(0.3)
        return opened(request)

    monkeypatch.setattr(web_files, "open_address", slowly)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(web.address).path)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert web.asked == ["GET /web/list.json"]


def test_a_named_set_reads_its_own_column_and_the_next_place(web, monkeypatch):
    named = prompts.PROMPT_SETS["hpdv2"]
    web.web["/b/p.json"] = json.dumps([{"prompt": "an owl"}]).encode()
    places = tuple(replace(named.places[0], source=f"{web.url}/{n}/p.json") for n in "ab")
    monkeypatch.setitem(prompts.PROMPT_SETS, "hpdv2", replace(named, places=places))
    found = read_prompts("hpdv2", column="caption")
    assert found.prompts == ("an owl",)
    assert found.describe() == (
        f"1 prompts from hpdv2 (apache-2.0), {web.url}/b/p.json (1 rows; tried before: "
        f"{web.url}/a/p.json: not found (404))"
    )
