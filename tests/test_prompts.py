"""Reading, drawing, keeping and shuffling prompts."""

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spo.data import prompts, web_files
from spo.data.prompts import read_prompts
from spo.errors import UserError
from spo.method.position import epoch_order
from spo.seeding import derive_seed

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prepare_prompts.py"
HUB = "user/captions"

# The same six rows in every format: 3 unique prompts, 1 empty, 1 without text, 1 duplicate.
CAPTIONS = ["a red fox", " a bear\t", "", None, "a red fox ", "une forêt d’été 🌲"]
UNIQUE = ("a red fox", "a bear", "une forêt d’été 🌲")
OBJECTS = [{"caption": caption, "n": i} for i, caption in enumerate(CAPTIONS)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_parquet(path: Path, captions: list = CAPTIONS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [b"not an image"] * len(captions)
    pq.write_table(pa.table({"caption": captions, "jpg": images}), path, row_group_size=2)
    return str(path)


def dumps(rows: list) -> str:
    return json.dumps(rows, ensure_ascii=False)


def counts(found) -> tuple[int, int, int, int]:
    reasons = ("empty", "without text", "duplicates")
    return found.rows, *(found.left_out[reason] for reason in reasons)


# ---- files -----------------------------------------------------------------------------------

TEXTS = {
    "objects.json": dumps(OBJECTS),
    "strings.json": dumps(CAPTIONS),
    "objects.jsonl": "\n".join(map(dumps, OBJECTS)) + "\n",
    "strings.JSONL": "\r\n".join(map(dumps, CAPTIONS)),
}


@pytest.mark.parametrize("bom", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("name", TEXTS)
def test_json_files(tmp_path, name, bom):
    found = read_prompts(write(tmp_path / name, bom + TEXTS[name]))
    assert found.prompts == UNIQUE
    assert counts(found) == (6, 1, 1, 1)


def test_official_file_of_captions(tmp_path):
    found = read_prompts(write(tmp_path / "p.json", '[{"caption": "a"}, {"caption": "b"}]'))
    assert found.prompts == ("a", "b")


def test_txt(tmp_path):
    found = read_prompts(write(tmp_path / "p.txt", "\ufeffa fox\r\n\r\n  a bear \na fox\nan owl"))
    assert found.prompts == ("a fox", "a bear", "an owl")
    assert counts(found) == (5, 1, 0, 1)


def test_a_prompt_of_megabytes_never_meets_a_tokenizer(tmp_path):
    fox, long = "a fox", "fox " * 500_000
    found = read_prompts(write(tmp_path / "p.txt", f"{fox}\n{long}\n{'x' * 100_000}\n"))
    assert found.prompts == (fox, "x" * 100_000)
    assert found.left_out == {"of more than 100,000 characters": 1}
    path = write(tmp_path / "one.json", dumps([long]))
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert len(str(error.value)) < 500
    assert "no usable prompts" in str(error.value)
    assert "1 of more than 100,000 characters left out" in str(error.value)


def test_a_txt_line_ends_only_at_a_line_break(tmp_path):
    prompt = "a\u2028b\x0bc\x85d"  # str.splitlines would make four prompts of it
    assert read_prompts(write(tmp_path / "p.txt", f"{prompt}\n")).prompts == (prompt,)


def test_csv(tmp_path):
    content = (
        '\ufeffid,caption\r\n1,"a fox, in snow"\r\n2,"two\nlines"\r\n3,\r\n4\r\n5,"""hi"""\r\n'
    )
    found = read_prompts(write(tmp_path / "p.csv", content))
    assert found.prompts == ("a fox, in snow", "two\nlines", '"hi"')
    assert counts(found) == (5, 1, 1, 0)


def test_parquet(tmp_path):
    found = read_prompts(write_parquet(tmp_path / "p.parquet"))
    assert found.prompts == UNIQUE
    assert counts(found) == (6, 1, 1, 1)


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.csv", "p.parquet"])
def test_column(tmp_path, name):
    path = tmp_path / name
    if name == "p.parquet":
        pq.write_table(pa.table({"caption": ["no"], "text": ["yes"]}), path)
    else:
        row = {"caption": "no", "text": "yes"}
        content = {"p.json": dumps([row]), "p.jsonl": dumps(row), "p.csv": "caption,text\nno,yes"}
        write(path, content[name])
    assert read_prompts(str(path), column="text").prompts == ("yes",)


def test_rows_that_are_no_text_are_left_out(tmp_path):
    rows = ["a fox", 3, None, ["a"], {"n": 1}, {"caption": 2.5}, "half an emoji \ud83d", True]
    found = read_prompts(write(tmp_path / "p.json", json.dumps(rows)))
    assert found.prompts == ("a fox",)
    assert counts(found) == (8, 0, 7, 0)


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p.txt", "p.csv", "p.parquet"])
def test_any_text_survives(tmp_path, name):
    prompts = ["👩‍🚀🐈 zwei", "قطة على القمر", "חתול על הירח", "猫", "x" * 100_000]
    path = tmp_path / name
    if name == "p.parquet":
        write_parquet(path, prompts)
    else:
        lines = {"p.json": dumps(prompts), "p.jsonl": "\n".join(map(dumps, prompts))}
        write(path, lines.get(name, "\n".join(["caption"][: name == "p.csv"] + prompts)))
    assert read_prompts(str(path)).prompts == tuple(prompts)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.txt", "a fox")
    assert read_prompts("~/p.txt").prompts == ("a fox",)


# ---- the draw --------------------------------------------------------------------------------


@pytest.fixture
def hundred(tmp_path) -> str:
    rows = [f"prompt {i}" for i in range(100)]
    return write(tmp_path / "hundred.json", json.dumps(rows + rows[:50]))


def test_draw_is_seeded(hundred):
    first = read_prompts(hundred, num=20, seed=1)
    expected = random.Random(1).sample(range(100), 20)
    assert first.prompts == tuple(f"prompt {i}" for i in expected)
    assert first == read_prompts(hundred, num=20, seed=1)
    assert set(first.prompts) != set(read_prompts(hundred, num=20, seed=2).prompts)


def test_draw_is_unique_and_may_take_all(hundred):
    drawn = read_prompts(hundred, num=100).prompts
    assert len(set(drawn)) == 100
    everything = read_prompts(hundred).prompts
    assert everything == tuple(f"prompt {i}" for i in range(100))
    assert drawn != everything


@pytest.mark.parametrize("num", [101, -1])
def test_impossible_draw(hundred, num):
    with pytest.raises(UserError, match=r"100 unique .* asks for .*lower prompts\.num to at most"):
        read_prompts(hundred, num=num)


def test_describe(tmp_path, hundred):
    path = write(tmp_path / "p.json", TEXTS["objects.json"])
    assert read_prompts(path).describe() == (
        f"3 prompts from {path} (6 rows; 1 empty, 1 without text, 1 duplicates left out)"
    )
    assert read_prompts(hundred, num=20, seed=7).describe() == (
        f"20 prompts from {hundred} (150 rows; 50 duplicates left out; 20 drawn with seed 7)"
    )
    path = write(tmp_path / "p.txt", "a fox\n" + "\n" * 1000)
    assert read_prompts(path).describe().endswith("(1,001 rows; 1,000 empty left out)")


# ---- what is wrong with a file ---------------------------------------------------------------

BAD = {
    "json.json": ('[{"caption": "a"},', ["json.json", "line 1 column 19"]),
    "deep.json": ("[" * 200_000, ["deep.json"]),
    "digits.json": ("9" * 5000, ["digits.json"]),
    "number.json": ("3", ["number.json", "no list"]),
    "dict.json": ('{"caption": {"0": "a"}}', ["dict.json", "no list"]),
    "key.json": ('[{"text": "a", "id": 1}]', ["key.json", "'caption'", "'id', 'text'", "column"]),
    "table.json": ('{"caption": ["a"]}', ["table.json", "no list"]),
    "lines.jsonl": ('{"caption": "a"}\n{"caption"\n', ["lines.jsonl", "line 2"]),
    "key.jsonl": ('{"text": "a"}\n', ["key.jsonl", "'caption'", "'text'"]),
    "latin.txt": ("fox\nforêt".encode("latin-1"), ["latin.txt", "utf-8"]),
    "utf16.csv": ("caption\nfox".encode("utf-16"), ["utf16.csv", "utf-8"]),
    "header.csv": ("text;id\na;1\n", ["header.csv", "'caption'", "'text;id'"]),
    "nothing.csv": ("", ["nothing.csv", "'caption'", "none at all"]),
    "comma.csv": ("caption\na fox\na fox, in snow\n", ["comma.csv", "line 3", "quote its commas"]),
    "quote.csv": ('caption\n"a fox\n', ["quote.csv", "end of data"]),
    "text.parquet": ("not parquet", ["text.parquet", "arquet"]),
    "nothing.parquet": ("", ["nothing.parquet"]),
    "nothing.txt": ("", ["nothing.txt", "no usable prompts", "0 rows"]),
    "blank.txt": (" \n\n", ["blank.txt", "no usable prompts", "2 empty"]),
    "numbers.json": ("[1, 2]", ["numbers.json", "no usable prompts", "2 without text"]),
    "p.yaml": ("- a fox", ["p.yaml", ".json, .jsonl, .txt, .csv, .parquet"]),
    "noending": ("a fox", ["noending", ".json, .jsonl, .txt, .csv, .parquet"]),
}


def complaint(source: str, **options) -> str:
    with pytest.raises(UserError) as info:
        read_prompts(source, **options)
    message = str(info.value)
    assert message.count("\n") == 0
    return message


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path, name):
    content, named = BAD[name]
    message = complaint(write(tmp_path / name, content))
    assert message.startswith("prompts.source: ")
    assert [part for part in named if part not in message] == []


def test_bad_parquet(tmp_path):
    path = Path(write_parquet(tmp_path / "p.parquet"))
    assert "'text' (there: 'caption', 'jpg')" in complaint(str(path), column="text")
    path.write_bytes(path.read_bytes()[:-20])
    assert str(path) in complaint(str(path))


def test_missing_file(tmp_path):
    assert f"no file {tmp_path}/p.json" in complaint(f"{tmp_path}/p.json")
    assert "no file user/captions.txt" in complaint("user/captions.txt")
    for source in (f"{tmp_path}/prompts", "a/b/c", "./prompts", "a red fox", ""):
        assert f"no file or folder {source!r}" in complaint(source)


def test_key_is_named():
    assert complaint("no.txt").startswith("prompts.source: no file no.txt")
    assert complaint("no.txt", key="eval.prompts").startswith("eval.prompts: no file no.txt")


# ---- datasets: folders -----------------------------------------------------------------------


def test_folder_of_parquet(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", CAPTIONS[:3])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", CAPTIONS[3:])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ["a test"])
    found = read_prompts(str(tmp_path))
    assert found.prompts == UNIQUE
    assert counts(found) == (6, 1, 1, 1)
    assert read_prompts(str(tmp_path), split="test").prompts == ("a test",)
    message = complaint(str(tmp_path), split="validation")
    assert all(part in message for part in (str(tmp_path), "'validation'", "'train'", "'test'"))
    assert "prefetch" not in message
    missing = complaint(str(tmp_path), column="text")
    assert missing.startswith(f"prompts.source: {tmp_path} has no column 'text' (there: 'caption'")


def test_folder_of_csv_has_no_columns_option(tmp_path):
    write(tmp_path / "train.csv", "caption,n\na fox,1\n,2\na bear,3\n")
    assert read_prompts(str(tmp_path)).prompts == ("a fox", "a bear")
    assert "'text' (there: 'caption', 'n')" in complaint(str(tmp_path), column="text")


def test_folder_of_images_decodes_none(tmp_path):
    write(tmp_path / "a.png", "not an image")
    write(tmp_path / "metadata.csv", "file_name,caption\na.png,a fox\n")
    assert read_prompts(str(tmp_path)).prompts == ("a fox",)


def test_folder_of_save_to_disk(tmp_path):
    saved = datasets.Dataset.from_dict({"caption": CAPTIONS, "n": list(range(6))})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        assert read_prompts(str(tmp_path / name)).prompts == UNIQUE
        assert "(there: 'caption', 'n')" in complaint(str(tmp_path / name), column="text")
    assert "no split 'test', only train" in complaint(str(tmp_path / "splits"), split="test")


@pytest.mark.parametrize("name", ["a [1] b", "a ? b", "a * b", "a [!x] b", "a ** b"])
def test_a_folder_that_exists_is_no_pattern(tmp_path, monkeypatch, name):
    for decoy in ("a 1 b", "a z b"):
        write_parquet(tmp_path / decoy / "train.parquet", ["of another folder"])
        (tmp_path / decoy / "csv").mkdir()
        write(tmp_path / decoy / "csv" / "train.csv", "caption\nof another folder\n")
    folder = tmp_path / name
    write_parquet(folder / "train-00000-of-00001.parquet", CAPTIONS)
    write_parquet(folder / "test.parquet", ["a test"])
    (folder / "csv").mkdir()
    write(folder / "csv" / "train.csv", "caption\na fox\n")
    datasets.Dataset.from_dict({"caption": CAPTIONS}).save_to_disk(folder / "disk")
    monkeypatch.chdir(tmp_path)
    for source in (str(folder / "csv"), f"{name}/csv"):
        assert read_prompts(source).prompts == ("a fox",)
    assert read_prompts(str(folder / "disk")).prompts == UNIQUE
    for other in ("csv", "disk"):
        shutil.rmtree(folder / other)
    assert read_prompts(str(folder)).prompts == UNIQUE
    assert read_prompts(str(folder), split="test").prompts == ("a test",)
    assert "'train'" in complaint(str(folder), split="validation")


def test_empty_folder(tmp_path):
    assert str(tmp_path) in complaint(str(tmp_path))


# ---- datasets: the Hub -----------------------------------------------------------------------


class FakeHub:
    """Stands in for datasets.load_dataset: answers HUB from a local folder, unless offline."""

    def __init__(self, folder: Path, load):
        self.folder, self.load = folder, load
        self.online = True
        self.calls, self.loaded = [], None

    def __call__(self, source, **options):
        self.calls.append((source, options))
        if not self.online:
            raise ConnectionError(f"Couldn't reach {source}\n(offline)")
        self.loaded = self.load(str(self.folder), **options)
        return self.loaded


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    write_parquet(tmp_path / "hub" / "train.parquet", [f"prompt {i % 40}" for i in range(50)])
    fake = FakeHub(tmp_path / "hub", datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    monkeypatch.setattr(prompts, "tell_if_moved", lambda *_: None)
    monkeypatch.setattr(web_files.constants, "HF_ASSETS_CACHE", tmp_path / "cache" / "assets")
    monkeypatch.chdir(tmp_path)
    return fake


def cache_files(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_hub_streams_the_one_column(hub):
    found = read_prompts(HUB)
    assert found.prompts == tuple(f"prompt {i}" for i in range(40))
    assert counts(found) == (50, 0, 0, 10)
    assert all(source == HUB and options["streaming"] for source, options in hub.calls)
    assert hub.calls[-1][1]["columns"] == ["caption"]
    assert hub.loaded.column_names == ["caption"]


def test_a_revision_of_the_hub(hub, tmp_path):
    first = read_prompts(f"{HUB}@v1", num=10)
    source, options = hub.calls[-1]
    assert (source, options["revision"]) == (HUB, "v1")
    assert f"from {HUB}@v1 (" in first.describe()
    hub.online = False
    assert read_prompts(f"{HUB}@v1", num=10).prompts == first.prompts
    complaint(HUB, num=10)  # another revision is another draw


@pytest.mark.parametrize("num", [0, 10])
def test_hub_draw_is_kept(hub, tmp_path, num):
    first = read_prompts(HUB, num=num, seed=3)
    (kept,) = cache_files(tmp_path)
    assert kept.name.startswith(f"user_captions-train-caption-{num or 'all'}-seed3-")
    assert json.loads(kept.read_text()) == [{"caption": prompt} for prompt in first.prompts]
    hub.online = False
    again = read_prompts(HUB, num=num, seed=3)
    assert again.prompts == first.prompts
    assert HUB in again.describe() and str(kept) in again.describe()


def test_every_draw_is_kept_apart(hub, tmp_path):
    for options in ({}, {"num": 5}, {"num": 6}, {"num": 5, "seed": 1}, {"column": "caption"}):
        read_prompts(HUB, **options)
    assert len(cache_files(tmp_path)) == 4  # the last is the first again
    hub.online = False
    complaint(HUB, split="test", num=5)


def test_a_damaged_draw_is_named(hub, tmp_path):
    read_prompts(HUB, num=10)
    (kept,) = cache_files(tmp_path)
    kept.write_text(kept.read_text()[:20])
    assert f"cannot read {kept}" in complaint(HUB, num=10)


def test_cache_that_cannot_be_written(hub, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert len(read_prompts(HUB, num=10).prompts) == 10
    assert "not kept" in caplog.text


def test_kept_draws_are_in_the_hubs_own_cache(hub, tmp_path):
    drawn = read_prompts(HUB, num=10, seed=3)
    options = (f"--source={HUB}", "--num=10", "--seed=3", "--output=kept.txt")
    done = prepare(tmp_path, *options, home=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept.txt").read_text().splitlines() == list(drawn.prompts)


def test_folder_is_not_kept(hub, tmp_path):
    assert len(read_prompts("hub", num=10).prompts) == 10
    assert cache_files(tmp_path) == []


def test_hub_out_of_reach(hub):
    hub.online = False
    message = complaint(HUB)
    assert all(part in message for part in (HUB, "Couldn't reach", "scripts/prefetch.py --config="))


def test_what_is_not_the_networks_fault_is_not_said_to_be(hub, monkeypatch):
    message = complaint(HUB, split="nope")
    assert f"cannot read dataset '{HUB}', split 'nope' (ValueError: " in message
    assert "check prompts.source and prompts.split" in message and "no answer" not in message

    def full(*_, **__):
        raise OSError("Not enough disk space. Needed: 202 GB")

    monkeypatch.setattr(datasets, "load_dataset", full)
    message = complaint(HUB)
    assert f"{HUB}: Not enough disk space. Needed: 202 GB" in message and "no answer" not in message


def test_hub_fails_halfway(hub, tmp_path, monkeypatch):
    def broken(self, batch_size):
        yield {"caption": ["a fox"]}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets.IterableDataset, "iter", broken)
    assert "connection reset" in complaint(HUB)
    assert cache_files(tmp_path) == []


# ---- order and seeds -------------------------------------------------------------------------


def test_epoch_order():
    order = epoch_order(100, seed=42, epoch=0)
    assert sorted(order) == list(range(100))
    assert order == epoch_order(100, seed=42, epoch=0)
    others = [epoch_order(100, 42, 1), epoch_order(100, 43, 0), epoch_order(100, 1, 42)]
    assert order not in others and others[0] != others[1] != list(range(100))
    assert epoch_order(1, 42, 0) == [0]


def test_derive_seed():
    # From `printf 'rollout/42/0' | sha256sum`: the first 16 digits, without the sign bit.
    assert derive_seed("rollout", 42, 0) == 0x6B444340547F12BE & (2**63 - 1)
    parts = [(), (1, 23), (12, 3), (123,), ("a", 1), (1, "a"), (-1,)]
    seeds = {derive_seed(*p) for p in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ---- the script ------------------------------------------------------------------------------


def prepare(tmp_path: Path, *options: str, home: Path | None = None):
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    env["HF_HOME"] = str(home or tmp_path)
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)


def test_script_draws(tmp_path, hundred):
    output = tmp_path / "new" / "drawn.json"
    done = prepare(tmp_path, f"--source={hundred}", "--num=5", "--seed=9", f"--output={output}")
    assert done.returncode == 0, done.stderr
    expected = read_prompts(hundred, num=5, seed=9)
    assert done.stdout == expected.describe() + "\n"
    assert json.loads(output.read_text()) == [{"caption": prompt} for prompt in expected.prompts]


def test_script_without_network(tmp_path):
    done = prepare(tmp_path, "--output=p.json")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        done.stderr.startswith("error: prompts.source: https://raw.githubusercontent.com/")
        and done.stderr.count("not in the cache, and HF_HUB_OFFLINE is set; then https://") == 2
    )
    assert not (tmp_path / "p.json").exists()


def test_script_writes_txt(tmp_path):
    write_prompts = runpy.run_path(str(SCRIPT))["write_prompts"]
    write_prompts(UNIQUE, tmp_path / "p.txt")
    assert read_prompts(str(tmp_path / "p.txt")).prompts == UNIQUE
    with pytest.raises(UserError, match="1 prompts hold line breaks"):
        write_prompts(("a fox", "two\nlines"), tmp_path / "broken.txt")
    assert not (tmp_path / "broken.txt").exists()


# ---- the prompts that come with the code -----------------------------------------------------


@pytest.mark.parametrize(("name", "num"), [("tiny", 64), ("validation", 64)])
def test_assets(name, num):
    found = read_prompts(str(ROOT / "assets" / "prompts" / f"{name}.txt"))
    assert counts(found) == (num, 0, 0, 0)
