"""Opening labelled pairs: rows with the columns of Pick-a-Pic, through `datasets`."""

from dataclasses import dataclass
from glob import escape
from pathlib import Path

import datasets
from datasets import Dataset, IterableDataset

from spo.command_line.values import Checked, whole
from spo.data.prompts import saved_split
from spo.errors import UserError, in_one_line
from spo.hub import is_hub_id

LABEL_COLUMNS = ("caption", "label_0", "label_1", "has_label", "num_example_per_prompt")
IMAGE_COLUMNS = ("jpg_0", "jpg_1")
COLUMNS = LABEL_COLUMNS + IMAGE_COLUMNS


@dataclass(frozen=True)
class PairData(Checked, section="data"):
    """The source of labelled pairs, and how it is read; `config.data` explains each field."""

    source: str
    revision: str | None
    train_split: str
    validation_split: str
    streaming: bool
    shuffle_buffer: int = whole()
    image_size: int = whole()
    num_workers: int = whole(0)
    max_validation: int = whole(0)


def open_split(data: PairData, split: str) -> Dataset | IterableDataset:
    """Opens a split and returns its rows with only `COLUMNS`, images as encoded bytes.

    Raises UserError if the source, the split or a column does not exist.
    """
    try:
        rows = _open(data, split)
        # Some formats tell their columns only by a row.
        found = rows.column_names or list(next(iter(rows), {}))
        missing = [name for name in COLUMNS if name not in found]
        if missing:
            raise UserError(
                f"{data.source}, split {split!r}, has no column {', '.join(missing)}; "
                f"a labelled pair needs {', '.join(COLUMNS)}."
            )
        # A dataset saved with a format would give arrays and tensors.
        rows = rows.select_columns(list(COLUMNS)).with_format(None)
        for name in IMAGE_COLUMNS:
            if isinstance((rows.features or {}).get(name), datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return rows
    except UserError as error:
        raise UserError(f"data.source: {error}") from error
    except Exception as error:  # whatever the network, the file systems and the builders raise
        raise UserError(
            f"data.source: cannot read {data.source!r}, split {split!r} ({type(error).__name__}: "
            f"{in_one_line(error)}); check data.source, data.train_split and data.validation_split."
        ) from error


def _open(data: PairData, split: str) -> Dataset | IterableDataset:
    path = Path(data.source)
    saved = saved_split(data.source, split, alone=data.train_split)
    if saved is not None:
        return saved.to_iterable_dataset() if data.streaming else saved
    if path.is_dir():
        files = _parquet_files(path, split)
        return datasets.load_dataset(
            "parquet", data_files={split: files}, split=split, streaming=data.streaming
        )
    if not is_hub_id(data.source):
        raise UserError(f"no folder {data.source!r}, and no id of a Hub dataset either.")
    return datasets.load_dataset(
        data.source, split=split, revision=data.revision, streaming=data.streaming
    )


def _parquet_files(folder: Path, split: str) -> list[str]:
    """Returns the files of a split, escaped, as `datasets` takes every name for a pattern."""
    name = escape(split)
    patterns = (f"{name}-*.parquet", f"{name}.parquet", f"{name}/*.parquet")
    found = [f for p in patterns for where in ("", "data/") for f in folder.glob(where + p)]
    if not found:
        raise UserError(f"{folder} holds no parquet files of split {split!r}.")
    return [escape(file) for file in sorted(map(str, found))]
