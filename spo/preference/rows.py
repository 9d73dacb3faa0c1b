"""Finds the rows that can be used, and deals them out to the processes in a seeded order."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice

from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from spo.data.prompts import LONGEST_PROMPT
from spo.errors import UserError, first_available
from spo.method.position import epoch_order
from spo.preference.batches import DAMAGED_IMAGE, RawBatch, Row, decode_pair
from spo.preference.filter import FILTERED_OUT, RowFilter, read_filter
from spo.preference.source import LABEL_COLUMNS, PairData, open_split, sources_of
from spo.seeding import derive_seed

_VALID = {(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)}
_FIRST_ROWS = 10_000  # of a stream, to look at before a run starts


def fault_of(row: Row, need_has_label: bool = False) -> str | None:
    """Returns why a row cannot be used, or None if all but its images can."""
    caption = row["caption"]
    if not isinstance(caption, str) or not caption.strip():
        return "no caption"
    if len(caption) > LONGEST_PROMPT:
        return "caption too long"
    if (_number(row["label_0"]), _number(row["label_1"])) not in _VALID:
        return "invalid label"
    examples = _number(row["num_example_per_prompt"])
    if not (examples > 0 and math.isfinite(examples)):
        return "invalid num_example_per_prompt"
    if need_has_label and row["has_label"] != 1:
        return "without has_label"
    return None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def label_rows(rows: Dataset) -> Iterator[Row]:
    """Yields all rows without their images."""
    table = rows.select_columns(list(LABEL_COLUMNS)).with_format("arrow")[:]
    return (row for batch in table.to_batches() for row in batch.to_pylist())


def usable_rows(rows: Dataset, need_has_label: bool = False) -> tuple[list[int], Counter]:
    """Returns the indices of the rows that `fault_of` passes, and the number of rows per fault."""
    found = [fault_of(row, need_has_label) for row in label_rows(rows)]
    usable = [index for index, fault in enumerate(found) if fault is None]
    return usable, Counter(fault for fault in found if fault is not None)


@dataclass(frozen=True)
class UsableRows:
    """The rows of a split that a run uses."""

    indices: tuple[int, ...] | None  # of rows without a label fault; None for a stream
    faults: Counter  # why the other rows are left out
    description: str
    data: PairData  # where they are
    unavailable: tuple[str, ...] = ()  # a line for each place before it that did not answer


def find_training_rows(data: PairData) -> UsableRows:
    """Finds usable rows to train on, in the first source of them that answers; UserError if none."""
    own = read_filter(data.filter, data.filter_strategy) if data.filter else None
    found, failed = first_available(
        sources_of(data), lambda each: find_usable_rows(each, each.train_split, row_filter=own)
    )
    if found is None:
        raise UserError(
            f"{'; then '.join(failed)}; or set data.source to a folder of parquet files, or to other "
            "pairs, such as HPDv3 (docs/preference_model.md)"
        )
    lines = (f"{reason}; {found.data.source} is read instead" for reason in failed)
    return replace(found, unavailable=tuple(lines))


def find_usable_rows(
    data: PairData, split: str, need_has_label: bool = False, row_filter: RowFilter | None = None
) -> UsableRows:
    """Finds usable rows; looks at images, and at a stream, until a sound pair; UserError if none."""
    rows = open_split(data, split)
    if data.streaming:
        usable, faults, candidates = None, Counter(), islice(rows, _FIRST_ROWS)
        name = f"{data.source}, split {split!r}, streamed"
    else:
        usable, faults = usable_rows(rows, need_has_label)
        if row_filter is not None:
            kept = row_filter.apply(usable, rows)
            usable, faults[FILTERED_OUT] = kept, len(usable) - len(kept)
        candidates = (rows[index] for index in usable)
        name = f"{data.source}, split {split!r}: {len(usable):,} of {len(rows):,} rows usable"
    seen = Counter()
    for row in candidates:
        fault = fault_of(row, need_has_label)
        if fault is None and decode_pair(row, data.image_size) is not None:
            indices = None if usable is None else tuple(usable)
            return UsableRows(indices, faults, f"{name}{describe_faults(faults)}", data)
        seen[fault or DAMAGED_IMAGE] += 1
    raise UserError(
        f"data.source: {data.source}, split {split!r}, has no usable row"
        f"{describe_faults(faults + seen)}."
    )


def describe_faults(faults: Counter) -> str:
    """Says in parentheses how many rows were left out for which reason; empty if none were."""
    counts = ", ".join(f"{number:,} {reason}" for reason, number in sorted(faults.items()))
    return f" (left out: {counts})" if counts else ""


@dataclass(frozen=True)
class Share:
    """The part of every minibatch that one process takes."""

    rank: int
    processes: int
    size: int  # rows of its minibatch

    def places(self, minibatch: int) -> range:
        """Returns the places, among all rows drawn, of this process's rows of a minibatch."""
        first = (minibatch * self.processes + self.rank) * self.size
        return range(first, first + self.size)


def table_batches(
    rows: Dataset, usable: Sequence[int], seed: int, share: Share, start: int
) -> Iterator[RawBatch]:
    """Yields this process's minibatches from number `start` on, without end.

    Every epoch has its own order, and epochs follow each other without a gap.
    """
    order = lru_cache(maxsize=2)(lambda epoch: epoch_order(len(usable), seed, epoch))
    for minibatch in count(start):
        places = share.places(minibatch)
        split = [divmod(place, len(usable)) for place in places]
        batch = [rows[usable[order(epoch)[position]]] for epoch, position in split]
        yield RawBatch(batch, places)


def stream_batches(
    rows: IterableDataset, seed: int, buffer_size: int, share: Share, start: int
) -> Iterator[RawBatch]:
    """Yields as `table_batches`, from a stream split among processes; drops those before `start`."""
    sound = _sound_rows(rows, seed, buffer_size, share)
    for minibatch in count():
        batch = list(islice(sound, share.size))
        if minibatch >= start:
            yield RawBatch(batch, share.places(minibatch))


def _sound_rows(rows: IterableDataset, seed: int, buffer_size: int, share: Share) -> Iterator[Row]:
    for epoch in count():
        shuffled = rows.shuffle(derive_seed(seed, "stream", epoch) % 2**32, buffer_size=buffer_size)
        mine = split_dataset_by_node(shuffled, share.rank, share.processes)
        row = None
        for row in filter(lambda row: fault_of(row) is None, mine):
            yield row
        if row is None:
            raise UserError(
                f"data.source: no row with a valid label for process {share.rank} of "
                f"{share.processes}; use fewer processes, or data.streaming=False."
            )


def validation_batches(
    rows: Dataset | IterableDataset, usable: Sequence[int] | None, limit: int, share: Share
) -> Iterator[RawBatch]:
    """Yields this process's share of the first `limit` usable rows (0: all); None for a stream."""
    sound = usable
    if usable is None:
        sound = (row for row in rows if fault_of(row, need_has_label=True) is None)
    mine = islice(enumerate(islice(sound, limit or None)), share.rank, None, share.processes)
    while chunk := list(islice(mine, share.size)):
        places, found = zip(*chunk, strict=True)
        batch = found if usable is None else [rows[index] for index in found]
        yield RawBatch(batch, places)
