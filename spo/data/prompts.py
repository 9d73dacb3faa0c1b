"""Prompts: read from a file or a dataset, drawn with a seed, shuffled for each epoch."""

import hashlib
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from spo.data.prompt_files import READERS, check_column, file_rows
from spo.errors import UserError
from spo.hub import is_hub_id

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji: no tokenizer or file takes it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Unique prompts, and what became of the rows they were read from."""

    source: str
    prompts: tuple[str, ...]
    rows: int
    empty: int
    not_text: int
    duplicates: int
    seed: int | None = None  # of the draw; None: every unique prompt was taken

    def describe(self) -> str:
        """One line for the log."""
        left_out = {"empty": self.empty, "without text": self.not_text}
        left_out["duplicates"] = self.duplicates
        counts = ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count)
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
    key: str = "prompts",
) -> PromptSet:
    """Read unique prompts from a file or dataset, and draw `num` of them (0: take all, in order).

    Raises UserError, with the config `key` in front, for whatever is wrong with the source.
    """
    try:
        path = Path(source).expanduser()
        if path.is_dir() and source:
            return draw_prompts(
                collect_prompts(source, _dataset_rows(str(path), split, column)), num, seed
            )
        if path.suffix.lower() in READERS or path.is_file():
            return draw_prompts(collect_prompts(source, file_rows(path, column)), num, seed)
        if not is_hub_id(source):
            raise UserError(f"no file or folder {source!r}, and no id of a Hub dataset either")
        return _read_hub(source, split, column, num, seed)
    except UserError as error:
        prefix = "prompts.source" if key == "prompts" else key
        raise UserError(f"{prefix}: {error}") from error


def collect_prompts(source: str, rows: Iterable[object]) -> PromptSet:
    """The unique prompts among `rows`, in order; UserError where there are none."""
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
    """`num` of the prompts in random order (0: all as they are); UserError where there are fewer."""
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
    except Exception as error:  # whatever the network, the file systems and the builders raise
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
    try:  # Parquet fetches the one column only, and so no images
        return datasets.load_dataset(source, split=split, streaming=True, columns=[column])
    except (TypeError, ValueError):  # other formats do not know `columns`
        return rows.select_columns([column])


def _read_hub(source: str, split: str, column: str, num: int, seed: int) -> PromptSet:
    """A draw from the Hub is kept, so that the next run needs neither time nor network for it."""
    cache = _cache_file(source, split, column, num, seed)
    if cache.exists():
        try:
            kept = collect_prompts(
                f"{source}, as drawn before in {cache}", file_rows(cache, "caption")
            )
            if kept.rows == len(kept.prompts) and num in (0, kept.rows):
                return kept
            reason = f"wanted {num:,} unique prompts: {kept.describe()}"
        except UserError as error:
            reason = str(error)
        logger.warning("drawing the prompts again, as the kept draw is damaged: %s", reason)
    drawn = draw_prompts(collect_prompts(source, _dataset_rows(source, split, column)), num, seed)
    try:
        _write_cache(cache, drawn.prompts)
    except OSError as error:  # a full or read-only disk is no reason to stop
        logger.warning("this draw is not kept for the next run: %s", error)
    return drawn


def _cache_file(source: str, split: str, column: str, num: int, seed: int) -> Path:
    parts = (source, split, column, num or "all", f"seed{seed}")
    readable = re.sub(r"[^\w.-]+", "_", "-".join(map(str, parts)))[:120]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    root = Path(os.environ.get("SPO_CACHE") or Path.home() / ".cache" / "spo")
    return root / "prompts" / f"{readable}-{digest}.json"


def _write_cache(path: Path, prompts: Collection[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump([{"caption": prompt} for prompt in prompts], file)
    os.replace(file.name, path)  # in one go: another process never reads half a file
