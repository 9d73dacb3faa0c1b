"""Labelled pairs: their sources, which are usable, each process's share, and their images."""

import io
import json
import math
from itertools import islice

import datasets
import numpy as np
import pytest
from labelled_pairs import make_row, picture, write_rows, write_splits
from PIL import Image

from config import spm_base, spm_hpdv3
from spo.command_line.values import fill
from spo.errors import RunError, UserError
from spo.preference.batches import RawBatch, decode_batch, decode_image, decode_pair, decoded
from spo.preference.rows import (
    Share,
    fault_of,
    stream_batches,
    table_batches,
    usable_rows,
    validation_batches,
)
from spo.preference.source import COLUMNS, PairData, open_split


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # Seconds that datasets waits at the end of a stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def data_source(source, streaming=False):
    data = spm_base.get_config().data
    return fill(PairData, data, source=str(source), streaming=streaming, train_split="train")


FAULTY = {
    "no caption": [{"caption": None}, {"caption": " "}],
    "caption too long": [{"caption": "fox " * 25_001}],
    "invalid label": [
        {"label_0": None},
        {"label_0": math.nan},
        {"label_0": 1.0, "label_1": 1.0},
        {"label_0": 0.7, "label_1": 0.3},
        {"label_0": -1.0, "label_1": 2.0},
    ],
    "invalid num_example_per_prompt": [
        {"num_example_per_prompt": None},
        {"num_example_per_prompt": 0},
        {"num_example_per_prompt": -3},
    ],
    "no image": [{"jpg_0": None}, {"jpg_1": b""}],
    "damaged image": [
        {"jpg_0": b"no picture"},
        {"jpg_1": picture(1, (64, 64), "JPEG")[:700]},
        {"jpg_1": picture(1, (2000, 1))},  # no size that memory would hold, scaled up
    ],
}


def mixed_rows():
    """Returns ten sound rows, the rows of FAULTY, and two sound rows without has_label."""
    faulty = [change for changes in FAULTY.values() for change in changes]
    rows = [make_row(i) for i in range(10)] + [make_row(50, **change) for change in faulty]
    return rows + [make_row(60, has_label=False), make_row(61, has_label=None)]


def counts_of(names):
    return {name: len(FAULTY[name]) for name in names}


LABELS = ("no caption", "caption too long", "invalid label", "invalid num_example_per_prompt")


def test_unusable_rows_are_left_out_and_counted(tmp_path):
    rows = open_split(data_source(write_splits(tmp_path / "d", mixed_rows(), [])), "train")
    usable, faults = usable_rows(rows)
    assert faults == counts_of(LABELS)
    assert usable == [*range(10), *range(21, 28)]
    # Validation also needs has_label.
    usable, faults = usable_rows(rows, need_has_label=True)
    assert faults == counts_of(LABELS) | {"without has_label": 2}
    assert usable == [*range(10), *range(21, 26)]


def test_damaged_images_weigh_nothing():
    rows = [row for row in mixed_rows() if fault_of(row) is None]
    batch = decode_batch(RawBatch(rows, range(len(rows))), 32)
    assert (batch.weights > 0).tolist() == [True] * 10 + [False] * 5 + [True] * 2
    assert batch.weights[:3].tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert batch.labels.tolist() == [row["label_0"] for row in rows]
    assert batch.images.shape == (17, 2, 3, 32, 32)
    first = np.asarray(Image.open(io.BytesIO(rows[0]["jpg_1"])))
    assert (batch.images[0, 1].permute(1, 2, 0).numpy() == first).all()
    assert (batch.images[10:15] == 128).all()


def rows_seen(batches):
    """Returns the rows of each batch without their images."""
    return [
        [(row["caption"], row["label_0"], row["num_example_per_prompt"]) for row in batch.rows]
        for batch in batches
    ]


KINDS = ("folder", "data", "disk", "images", "numpy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, kind, streaming):
    rows = [make_row(i) for i in range(6)]
    if kind in ("disk", "images", "numpy"):
        saved = datasets.Dataset.from_list(rows)
        if kind == "images":
            saved = saved.cast_column("jpg_0", datasets.Image()).cast_column(
                "jpg_1", datasets.Image()
            )
        if kind == "numpy":
            saved = saved.with_format("numpy")
        datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "d")
        source = tmp_path / "d"
    else:
        folder = tmp_path / "d" / ("data" if kind == "data" else "")
        write_rows(folder / "train-00000-of-00002.parquet", rows[:4])
        write_rows(folder / "train-00001-of-00002.parquet", rows[4:])
        write_rows(folder / "other.parquet", rows[:1])
        source = tmp_path / "d"
    found = list(open_split(data_source(source, streaming), "train"))
    assert [row["caption"] for row in found] == [row["caption"] for row in rows]
    for row, want in zip(found, rows, strict=True):
        assert set(row) == set(COLUMNS) and fault_of(row) is None
        assert (decode_pair(row, 32)[0] == decode_image(want["jpg_0"], 32)).all()


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_and_pictures_in_files(tmp_path, streaming):
    """As HPDv3 has them: JSON rows that name pictures of the folder, the preferred one first."""
    rows = []
    for i in range(3):
        names = [f"images/{i}_{n}.png" for n in (1, 2)]
        for n, name in enumerate(names):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(picture(10 * i + n))
        rows.append({"prompt": f"prompt {i}", "path1": names[0], "path2": names[1], "model1": "x"})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data = spm_hpdv3.get_config().data.to_dict() | {"source": str(tmp_path)}
    found = list(open_split(fill(PairData, data | {"streaming": streaming}), "train"))
    assert [row["caption"] for row in found] == ["prompt 0", "prompt 1", "prompt 2"]
    for i, row in enumerate(found):
        assert set(row) == set(COLUMNS) and fault_of(row, need_has_label=True) is None
        assert (row["label_0"], row["label_1"], row["num_example_per_prompt"]) == (1, 0, 1)
        pair = decode_pair(row, 32)
        assert (pair[0] == decode_image(picture(10 * i), 32)).all()
        assert (pair[1] == decode_image(picture(10 * i + 1), 32)).all()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "caption"}, "data.columns: 'prompt' is none of caption, label_0"),
        ({"caption": None}, "data.columns.caption: None is no column and no number"),
        ({"caption": "text"}, "no column text .there: caption, .*data.columns says what"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, message):
    write_rows(tmp_path / "train.parquet", [make_row(0)])
    values = spm_base.get_config().data.to_dict() | {"source": str(tmp_path), "columns": columns}
    with pytest.raises(UserError, match=message):
        open_split(fill(PairData, values), "train")


@pytest.mark.parametrize("name", ["a [1] b", "a ? b", "a * b"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_that_exists_is_no_pattern(tmp_path, name, streaming):
    write_splits(tmp_path / "a 1 b", [make_row(9)] * 5, [make_row(9)])
    write_splits(tmp_path / name, [make_row(0), make_row(1)], [make_row(2)])
    for source, split, seeds in (
        (name, "train", (0, 1)),
        (name, "validation_unique", (2,)),
        ("a 1 b", "train", (9,) * 5),
    ):
        found = list(open_split(data_source(tmp_path / source, streaming), split))
        assert [row["jpg_0"] for row in found] == [make_row(seed)["jpg_0"] for seed in seeds]
    with pytest.raises(UserError, match="no files of split '.'"):
        open_split(data_source(tmp_path / name, streaming), "*")


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("none.parquet", "train", "data.source: no folder 'none.parquet', and no id of a Hub"),
        ("d", "test", "data.source: .* no files of split 'test'"),
        ("disk", "test", "data.source: .* no split 'test', only train"),
        ("single", "validation_unique", "no split 'validation_unique', only train"),
        (
            "bare",
            "train",
            "no column label_1, jpg_1 .there: caption, .*; a labelled pair needs caption",
        ),
        ("broken", "train", "data.source: cannot read"),
        ("no/such/folder", "train", "no folder .*, and no id of a Hub dataset"),
    ],
)
def test_what_is_wrong_with_a_source_is_one_error(tmp_path, monkeypatch, source, split, message):
    monkeypatch.chdir(tmp_path)
    rows = [make_row(0)]
    write_splits(tmp_path / "d", rows, rows)
    single = datasets.Dataset.from_list(rows)
    single.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=single).save_to_disk(tmp_path / "disk")
    bare = {k: v for k, v in rows[0].items() if k not in ("label_1", "jpg_1")}
    write_rows(tmp_path / "bare" / "train.parquet", [bare])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match=message) as caught:
        open_split(data_source(source), split)
    assert "\n" not in str(caught.value)


def numbered(n):
    return datasets.Dataset.from_list(
        [make_row(0, caption=f"c{i}", num_example_per_prompt=i + 1) for i in range(n)]
    )


def captions(batches, number):
    return [[row["caption"] for row in batch.rows] for batch in islice(batches, number)]


def test_epochs_are_whole_and_shared_out_and_can_be_entered_anywhere():
    rows, usable = numbered(7), [0, 1, 2, 4, 5, 6]
    one = captions(table_batches(rows, usable, 3, Share(0, 1, 4), 0), 6)
    flat = sum(one, [])
    epochs = [flat[:6], flat[6:12], flat[12:18], flat[18:24]]
    assert all(sorted(epoch) == [f"c{i}" for i in usable] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    parts = [captions(table_batches(rows, usable, 3, Share(r, 2, 2), 0), 6) for r in (0, 1)]
    assert [a + b for a, b in zip(*parts, strict=True)] == one
    assert captions(table_batches(rows, usable, 3, Share(0, 1, 4), 4), 2) == one[4:]
    assert captions(table_batches(rows, usable, 4, Share(0, 1, 4), 0), 6) != one


@pytest.mark.parametrize("shards", [1, 2])
def test_streams_hold_the_same_rows_and_can_be_entered_anywhere(shards):
    rows = datasets.Dataset.from_list(mixed_rows()).to_iterable_dataset(num_shards=shards)
    usable = [row for row in mixed_rows() if fault_of(row) is None]
    batches = list(islice(stream_batches(rows, 3, 5, Share(0, 1, 4), 0), 9))
    seen = sum(rows_seen(batches), [])
    for epoch in (seen[:17], seen[17:34]):
        assert sorted(epoch) == sorted(rows_seen([RawBatch(usable, [])])[0])
    assert seen[:17] != seen[17:34]
    later = list(islice(stream_batches(rows, 3, 5, Share(0, 1, 4), 5), 4))
    assert rows_seen(later) == rows_seen(batches[5:])
    assert [list(b.places) for b in later] == [list(b.places) for b in batches[5:]]


def test_streams_are_split_among_processes():
    rows = numbered(8).to_iterable_dataset(num_shards=2)
    parts = [sum(captions(stream_batches(rows, 3, 5, Share(r, 2, 2), 0), 2), []) for r in (0, 1)]
    assert sorted(parts[0] + parts[1]) == [f"c{i}" for i in range(8)]


def test_a_stream_without_a_usable_row_is_an_error():
    rows = datasets.Dataset.from_list([make_row(0, caption="")]).to_iterable_dataset()
    with pytest.raises(UserError, match="data.source: no row with a valid label"):
        next(stream_batches(rows, 3, 5, Share(0, 1, 4), 0))


@pytest.mark.parametrize("limit", [0, 5])
def test_validation_rows_are_the_same_from_a_stream_and_shared_out(limit):
    rows = datasets.Dataset.from_list(mixed_rows())
    usable, _ = usable_rows(rows, need_has_label=True)
    places = []
    for rank in (0, 1):
        share = Share(rank, 2, 3)
        table = list(validation_batches(rows, usable, limit, share))
        stream = list(validation_batches(rows.to_iterable_dataset(), None, limit, share))
        assert rows_seen(table) == rows_seen(stream)
        assert [b.places for b in table] == [b.places for b in stream]
        places += [place for batch in table for place in batch.places]
        assert table[0].rows[1]["caption"] == mixed_rows()[usable[table[0].places[1]]]["caption"]
    assert sorted(places) == list(range(limit or len(usable)))


@pytest.mark.parametrize("size", [(50, 80), (80, 50), (32, 32), (20, 33)])
def test_images_are_prepared_as_torchvision_would(size):
    transforms = pytest.importorskip("torchvision.transforms")
    data = picture(5, size)
    prepare = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])
    expected = np.asarray(prepare(Image.open(io.BytesIO(data))))
    assert (decode_image(data, 32) == expected).all()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_every_mode_become_rgb(mode):
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(picture(3))).convert(mode)
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    assert decode_image(buffer.getvalue(), 16).shape == (16, 16, 3)


def test_decoding_in_the_background_changes_nothing():
    raw = [RawBatch([make_row(i), make_row(i + 1)], (i, i + 1)) for i in range(8)]
    alone, ahead = (list(decoded(iter(raw), 16, workers)) for workers in (0, 2))
    assert [batch.places for batch in ahead] == [batch.places for batch in raw]
    for one, other in zip(alone, ahead, strict=True):
        assert (one.images == other.images).all() and (one.labels == other.labels).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_is_one_line(workers):
    def broken():
        yield RawBatch([make_row(0)], (0,))
        raise ConnectionError("the line\nbroke")

    batches = decoded(broken(), 16, workers)
    next(batches)
    with pytest.raises(RunError, match=r"no row .* \(ConnectionError: the line\); go on from"):
        next(batches)
