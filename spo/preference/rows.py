"""Which rows can be used, and which of them each process takes, in which order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import Any

from datasets import Dataset
from datasets.distributed import split_dataset_by_node

from spo.data.prompts import epoch_order
from spo.errors import UserError
from spo.preference.source import LABEL_COLUMNS
from spo.seeding import derive_seed

# Why rows are left out. The images of a row are looked at when they are needed, the rest before.
LABEL_FAULTS = (
    "no caption",
    "invalid label",
    "invalid num_example_per_prompt",
    "without has_label",
)
IMAGE_FAULTS = ("no image", "damaged image")
FAULTS = LABEL_FAULTS + IMAGE_FAULTS
_VALID = {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}

Row = dict[str, Any]  # of the columns of Pick-a-Pic, as the user's files have them


@dataclass(frozen=True)
class RawBatch:
    """The rows of a minibatch of one process, images still encoded."""

    rows: Sequence[Row]
    places: Sequence[int]  # of each row among all that the run draws, or in the validation split
    faults: Counter  # why rows before these were left out


@dataclass(frozen=True)
class Share:
    """What one process takes of every minibatch."""

    rank: int
    processes: int
    size: int  # rows of its minibatch

    def places(self, minibatch: int) -> range:
        """Places, among all rows drawn, of this process's rows of a minibatch."""
        first = (minibatch * self.processes + self.rank) * self.size
        return range(first, first + self.size)


def fault_of(row: Row, need_has_label: bool = False) -> str | None:
    """One of LABEL_FAULTS, or None where the row can be used as far as its images can."""
    caption = row["caption"]
    if not isinstance(caption, str) or not caption.strip():
        return "no caption"
    if (_number(row["label_0"]), _number(row["label_1"])) not in _VALID:
        return "invalid label"
    examples = _number(row["num_example_per_prompt"])
    if not (examples > 0 and math.isfinite(examples)):
        return "invalid num_example_per_prompt"
    if need_has_label and row["has_label"] is not True and row["has_label"] != 1:
        return "without has_label"
    return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def usable_rows(rows: Dataset, need_has_label: bool = False) -> tuple[list[int], Counter]:
    """Indices of the rows without a label fault, and how many rows have which."""
    table = rows.select_columns(list(LABEL_COLUMNS)).with_format("arrow")[:]
    columns = [table.column(name).to_pylist() for name in LABEL_COLUMNS]
    usable, faults = [], Counter()
    for index, values in enumerate(zip(*columns, strict=True)):
        fault = fault_of(dict(zip(LABEL_COLUMNS, values, strict=True)), need_has_label)
        if fault is None:
            usable.append(index)
        else:
            faults[fault] += 1
    return usable, faults


def pick(rows: Dataset, indices: Sequence[int]) -> list[Row]:
    """Rows of a dataset that can be indexed."""
    columns = rows[list(indices)]
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def table_batches(
    rows: Dataset, usable: Sequence[int], seed: int, share: Share, start: int
) -> Iterator[RawBatch]:
    """This process's minibatches from number `start` on, without end.

    Every epoch has its own order, and epochs follow each other without a gap.
    """
    order = lru_cache(maxsize=2)(lambda epoch: epoch_order(len(usable), seed, epoch))
    for minibatch in count(start):
        places = share.places(minibatch)
        split = [divmod(place, len(usable)) for place in places]
        indices = [usable[order(epoch)[position]] for epoch, position in split]
        yield RawBatch(pick(rows, indices), places, Counter())


def stream_batches(
    rows, seed: int, buffer_size: int, share: Share, start: int
) -> Iterator[RawBatch]:
    """As `table_batches` of an IterableDataset, whose rows are split among the processes first.

    To start later it reads, and drops, what comes before.
    """
    stream, minibatch = _endless(rows, seed, buffer_size, share), 0
    while True:
        batch, faults = [], Counter()
        while len(batch) < share.size:
            row = next(stream)
            fault = fault_of(row)
            if fault is None:
                batch.append(row)
            else:
                faults[fault] += 1
        if minibatch >= start:
            yield RawBatch(batch, share.places(minibatch), faults)
        minibatch += 1


def _endless(rows, seed: int, buffer_size: int, share: Share) -> Iterator[Row]:
    for epoch in count():
        shuffled = rows.shuffle(derive_seed(seed, "stream", epoch) % 2**32, buffer_size=buffer_size)
        usable = False
        for row in split_dataset_by_node(shuffled, share.rank, share.processes):
            usable = usable or fault_of(row) is None
            yield row
        if not usable:
            raise UserError(
                f"data.source: no row with a valid label for process {share.rank} of "
                f"{share.processes}; use fewer processes, or data.streaming=False."
            )


def validation_batches(
    rows, usable: Sequence[int] | None, limit: int, share: Share
) -> Iterator[RawBatch]:
    """This process's share of the first `limit` (0: of all) usable rows; `usable` None: a stream."""
    if usable is None:
        sound = (row for row in rows if fault_of(row, need_has_label=True) is None)
    else:
        sound = iter(usable)
    mine = islice(enumerate(islice(sound, limit or None)), share.rank, None, share.processes)
    while chunk := list(islice(mine, share.size)):
        places, found = zip(*chunk, strict=True)
        yield RawBatch(found if usable is None else pick(rows, found), places, Counter())
