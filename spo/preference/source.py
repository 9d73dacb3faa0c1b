"""Opening labelled pairs: rows with the columns of Pick-a-Pic, through `datasets`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset

from spo.command_line.values import Checked, choice, number, whole
from spo.data.prompt_sets import PICKAPIC
from spo.data.prompts import saved_split
from spo.errors import UserError
from spo.hub import dataset_error, is_hub_id, tell_if_moved

LABEL_COLUMNS = ("caption", "label_0", "label_1", "has_label", "num_example_per_prompt")
IMAGE_COLUMNS = ("jpg_0", "jpg_1")
COLUMNS = LABEL_COLUMNS + IMAGE_COLUMNS
_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class PairData(Checked, section="data"):
    """The source of labelled pairs, and how it is read; `config.data` explains each field."""

    source: str
    revision: str | None
    columns: Mapping[str, str | float]  # ours -> the source's, or a number for all rows
    train_split: str
    validation_split: str
    streaming: bool
    shuffle_buffer: int = whole()
    image_size: int = whole()
    resize: str = choice("crop", "stretch")
    num_workers: int = whole(0)
    max_validation: int = whole(0)
    filter: str
    filter_strategy: int = number("1, 2 or 3", lambda strategy: strategy in (1, 2, 3))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filter and self.streaming:
            reason = "its rows are found by their position, which a stream does not tell"
            raise UserError(f"data.filter: {reason}; set data.streaming=False.")
        for name, theirs in self.columns.items():
            if name not in COLUMNS:
                raise UserError(f"data.columns: {name!r} is none of {', '.join(COLUMNS)}.")
            if not isinstance(theirs, str | int | float):
                raise UserError(f"data.columns.{name}: {theirs!r} is no column and no number.")


def sources_of(data: PairData) -> list[PairData]:
    """Returns `data`, and with each other id of its rows, in the order to try."""
    others = PICKAPIC if data.source in PICKAPIC else ()
    return [replace(data, source=source) for source in dict.fromkeys((data.source, *others))]


def open_split(data: PairData, split: str) -> Dataset | IterableDataset:
    """Opens a split and returns its rows with only `COLUMNS`, images as encoded bytes or paths.

    Raises Unavailable if the Hub does not give the source, UserError if there is no such source,
    split or column.
    """
    try:
        return _in_our_columns(_open(data, split), data, split)
    except UserError as error:
        raise type(error)(f"data.source: {error}") from error
    except Exception as error:  # whatever the network, the file systems and the builders raise
        keys = "data.source, data.train_split and data.validation_split"
        found = dataset_error(error, data.source, split, keys)
        raise type(found)(f"data.source: {found}") from error


def _in_our_columns(
    rows: Dataset | IterableDataset, data: PairData, split: str
) -> Dataset | IterableDataset:
    # Some formats tell their columns only by a row.
    found = rows.column_names or list(next(iter(rows), {}))
    wanted = {name: data.columns.get(name, name) for name in COLUMNS}
    theirs = {name: column for name, column in wanted.items() if isinstance(column, str)}
    missing = [column for column in theirs.values() if column not in found]
    if missing:
        raise UserError(
            f"{data.source}, split {split!r}, has no column {', '.join(missing)} (there: "
            f"{', '.join(found)}); a labelled pair needs {', '.join(COLUMNS)}, and data.columns says "
            "what the source calls them."
        )
    # A dataset saved with a format would give arrays and tensors.
    rows = rows.select_columns(list(theirs.values())).with_format(None)
    renamed = {column: name for name, column in theirs.items() if column != name}
    rows = rows.rename_columns(renamed) if renamed else rows
    for name in wanted.keys() - theirs.keys():
        rows = _with_number(rows, name, wanted[name])
    for name in IMAGE_COLUMNS:
        kind = (rows.features or {}).get(name)
        if isinstance(kind, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
        elif kind is None or getattr(kind, "dtype", "") in ("string", "large_string"):
            rows = rows.map(_under, fn_kwargs={"name": name, "folder": data.source})
    return rows


def _with_number(
    rows: Dataset | IterableDataset, name: str, number: float
) -> Dataset | IterableDataset:
    """Returns the rows with a further column, the same in all."""
    if isinstance(rows, Dataset):
        return rows.add_column(name, [number] * len(rows))
    return rows.map(lambda row: {name: number})


def _under(row: Mapping[str, object], name: str, folder: str) -> dict[str, object]:
    """Returns an image, with a path from the folder of the source if it is a path."""
    image = row[name]
    return {name: os.path.join(folder, image) if isinstance(image, str) else image}


def _open(data: PairData, split: str) -> Dataset | IterableDataset:
    path = Path(data.source)
    saved = saved_split(data.source, split, alone=data.train_split)
    if saved is not None:
        return saved.to_iterable_dataset() if data.streaming else saved
    if path.is_dir():
        kind, files = _files(path, split)
        return datasets.load_dataset(
            kind, data_files={split: files}, split=split, streaming=data.streaming
        )
    if not is_hub_id(data.source):
        raise UserError(f"no folder {data.source!r}, and no id of a Hub dataset either.")
    tell_if_moved(data.source, "dataset")
    return datasets.load_dataset(
        data.source, split=split, revision=data.revision, streaming=data.streaming
    )


def _files(folder: Path, split: str) -> tuple[str, list[str]]:
    """Returns the builder and the files of a split, escaped: `datasets` takes names for patterns.

    Raises UserError if there are none.
    """
    name = escape(split)
    for suffix, kind in _KINDS.items():
        patterns = (f"{name}-*{suffix}", f"{name}{suffix}", f"{name}/*{suffix}")
        found = [f for p in patterns for where in ("", "data/") for f in folder.glob(where + p)]
        if found:
            return kind, [escape(file) for file in sorted(map(str, found))]
    raise UserError(f"{folder} holds no files of split {split!r}: {', '.join(_KINDS)}.")
