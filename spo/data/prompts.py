"""Reads prompts from a file or a dataset, draws some with a seed, shuffles them per epoch."""

import hashlib
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import cached_assets_path
from tqdm import tqdm

from spo.atomic import write_file
from spo.data.prompt_files import READERS, check_column, file_rows
from spo.errors import UserError
from spo.hub import is_hub_id

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji: no tokenizer or file takes it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Unique prompts, and the numbers of rows that were read and left out."""

    source: str
    prompts: tuple[str, ...]
    rows: int
    empty: int
    not_text: int
    duplicates: int
    seed: int | None = None  # of the draw; None: all unique prompts

    def describe(self) -> str:
        """Returns one line for the log."""
        left_out = (
            (self.empty, "empty"),
            (self.not_text, "without text"),
            (self.duplicates, "duplicates"),
        )
        counts = ", ".join(f"{count:,} {name}" for count, name in left_out if count)
        notes = [f"{self.rows:,} rows", *([f"{counts} left out"] if counts else [])]
        if self.seed is not None:
            notes.append(f"{len(self.prompts):,} drawn with seed {self.seed}")
        return f"{len(self.prompts):,} prompts from {self.source} ({'; '.join(notes)})"


def read_prompts(
    source: str,
    *,
    split: str = "train",
    column: str = "caption",
    num: int = 0,
    seed: int = 42,
    key: str = "prompts.source",
) -> PromptSet:
    """Returns `num` unique prompts drawn from a file or dataset (0: all, in order).

    Raises UserError, with the config `key` in front, for a missing or unfit source.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir() and source:
            rows = _dataset_rows(str(path), split, column)
        elif path.suffix.lower() in READERS or path.is_file():
            rows = file_rows(path, column)
        elif is_hub_id(source):
            return _read_hub(source, split, column, num, seed)
        else:
            raise UserError(f"no file or folder {source!r}, and no id of a Hub dataset either")
        return draw_prompts(collect_prompts(source, rows), num, seed)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def collect_prompts(source: str, rows: Iterable[object]) -> PromptSet:
    """Returns the unique prompts among `rows`, in order; UserError if there are none."""
    prompts: dict[str, None] = {}  # a set that keeps the order of first appearance
    num_rows = empty = not_text = 0
    for row in rows:
        num_rows += 1
        if not isinstance(row, str) or LONE_SURROGATE.search(row):
            not_text += 1
        elif not (prompt := row.strip()):
            empty += 1
        else:
            prompts[prompt] = None
    duplicates = num_rows - empty - not_text - len(prompts)
    found = PromptSet(source, tuple(prompts), num_rows, empty, not_text, duplicates)
    if not prompts:
        raise UserError(f"no usable prompts: {found.describe()}")
    return found


def draw_prompts(found: PromptSet, num: int, seed: int) -> PromptSet:
    """Returns `num` of the prompts in random order (0: all in order); UserError for too few."""
    if num == 0:
        return found
    available = len(found.prompts)
    if not 0 < num <= available:
        raise UserError(
            f"{found.source} has {available:,} unique prompts, but prompts.num asks for {num:,}; "
            f"lower prompts.num to at most {available}, or set it to 0 to take all"
        )
    drawn = random.Random(seed).sample(range(available), num)
    return replace(found, prompts=tuple(found.prompts[i] for i in drawn), seed=seed)


def _dataset_rows(source: str, split: str, column: str) -> Iterator[object]:
    try:
        rows = _open_dataset(source, split, column)
        size = (rows.info.splits or {}).get(split)
        with tqdm(total=size and size.num_examples, desc=source, unit=" rows") as progress:
            for batch in rows.iter(batch_size=1000):
                yield from batch[column]
                progress.update(len(batch[column]))
    except UserError:
        raise
    except Exception as error:  # of the network, the file systems or the builders
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        advice = "check prompts.source and prompts.split"
        if not Path(source).is_dir():
            advice += ", or fetch it while online: `python scripts/prefetch.py --config=...`"
        raise UserError(
            f"cannot read dataset {source!r}, split {split!r} ({reason}); {advice}"
        ) from error


def _open_dataset(source: str, split: str, column: str):  # -> Dataset | IterableDataset
    import datasets  # takes seconds, and a file of prompts does not need it

    if any(Path(source, name).exists() for name in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(source)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise UserError(f"{source} has no split {split!r}, only {', '.join(saved)}")
            saved = saved[split]
        check_column(source, column, saved.column_names)
        return saved.select_columns([column])
    rows = datasets.load_dataset(source, split=split, streaming=True)
    names = rows.column_names or list(next(iter(rows), {}))  # some formats tell only by a row
    check_column(source, column, names)
    try:  # Parquet then fetches this column only, and so no images
        return datasets.load_dataset(source, split=split, streaming=True, columns=[column])
    except (TypeError, ValueError):  # other formats do not know `columns`
        return rows.select_columns([column])


def _read_hub(source: str, split: str, column: str, num: int, seed: int) -> PromptSet:
    """Returns a draw from the Hub, kept on disk so that the next run needs no time or network."""
    parts = (source, split, column, num or "all", f"seed{seed}")
    readable = re.sub(r"[^\w.-]+", "_", "-".join(map(str, parts)))[:120]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    name = f"{readable}-{digest}.json"
    if kept := _kept_draw(source, name, num):
        return kept
    drawn = draw_prompts(collect_prompts(source, _dataset_rows(source, split, column)), num, seed)
    rows = [{"caption": prompt} for prompt in drawn.prompts]
    try:
        write_file(cached_assets_path("spo", "prompts") / name, json.dumps(rows).encode())
    except (OSError, ValueError) as error:  # a full or read-only disk is no reason to stop
        logger.warning("this draw is not kept for the next run: %s", error)
    return drawn


def _kept_draw(source: str, name: str, num: int) -> PromptSet | None:
    """Returns the draw in the file `name` of the Hub's assets cache; None if missing or damaged."""
    try:
        file = cached_assets_path("spo", "prompts") / name
        if not file.exists():
            return None
        kept = collect_prompts(f"{source}, as drawn before in {file}", file_rows(file, "caption"))
        if kept.rows == len(kept.prompts) and num in (0, kept.rows):
            return kept
        reason = f"wanted {num:,} unique prompts: {kept.describe()}"
    except (OSError, ValueError):
        return None  # no folder for kept draws; keeping the new draw will warn
    except UserError as error:
        reason = str(error)
    logger.warning("drawing the prompts again, as the kept draw is damaged: %s", reason)
    return None
