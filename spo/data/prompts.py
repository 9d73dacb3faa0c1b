"""Reads prompts from a file or a dataset, draws some with a seed, shuffles them per epoch."""

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from glob import escape, has_magic
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from tqdm import tqdm

from spo.atomic import write_file
from spo.data.prompt_files import READERS, check_column, file_rows
from spo.data.prompt_sets import PROMPT_SETS, Place
from spo.data.web_files import assets, fetch, is_address
from spo.errors import UserError, first_available
from spo.hub import dataset_error, is_hub_id, tell_if_moved

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji: no tokenizer or file takes it
LONGEST_PROMPT = 100_000  # characters; a tokenizer takes 200 bytes and 3 us for each

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Unique prompts, and the numbers of rows that were read and left out."""

    source: str
    prompts: tuple[str, ...]
    rows: int
    left_out: Counter  # rows, by the reason
    seed: int | None = None  # of the draw; None: all unique prompts
    notes: tuple[str, ...] = ()  # places that did not answer, addresses that have moved

    def describe(self) -> str:
        """Returns one line for the log."""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        notes = [f"{self.rows:,} rows", *([f"{counts} left out"] if counts else [])]
        if self.seed is not None:
            notes.append(f"{len(self.prompts):,} drawn with seed {self.seed}")
        notes += self.notes
        return f"{len(self.prompts):,} prompts from {self.source} ({'; '.join(notes)})"

    def digest(self) -> str:
        """Returns what tells these prompts from others: the SHA-256 of them and their order."""
        return hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()


def read_prompts(
    source: str,
    *,
    split: str = "train",
    column: str = "caption",
    num: int = 0,
    seed: int = 42,
    key: str = "prompts.source",
) -> PromptSet:
    """Returns `num` unique prompts drawn from `source` (0: all, in order).

    `source` is a name in `PROMPT_SETS`, whose places are tried one after the other, a file, a folder
    of a dataset, an https address, or a Hub dataset user/name[@revision]. `split` and `column` are
    those of a source without a name. Raises UserError, with the config `key` in front, for a missing
    or unfit source.
    """
    named = PROMPT_SETS.get(source)
    places = named.places if named else (Place(source, split, column),)
    try:
        found, failed = first_available(places, lambda place: _read(place, num, seed))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if found is None:
        others = ", ".join(name for name in PROMPT_SETS if name != source)
        raise UserError(
            f"{key}: {'; then '.join(failed)}; name another source: a file, an https address, a Hub "
            f"dataset, or one of {others}"
        )
    if named:
        license = f" ({named.license})" if named.license else ""
        found = replace(found, source=f"{source}{license}, {found.source}")
    return replace(found, notes=(*found.notes, *(f"tried before: {each}" for each in failed)))


def _read(place: Place, num: int, seed: int) -> PromptSet:
    """Returns the prompts of one place; raises Unavailable if it does not answer."""
    source, column = place.source, place.column
    path, notes = Path(source).expanduser(), ()
    if path.is_dir() and source:
        rows = _dataset_rows(Place(str(path), place.split, column))
    elif is_address(source):
        file = fetch(source)
        notes = (f"moved to {file.moved_to}",) if file.moved_to else ()
        rows = file_rows(file.path, column)
    elif path.suffix.lower() in READERS or path.is_file():
        rows = file_rows(path, column)
    elif is_hub_id(source.partition("@")[0]):
        return _read_hub(place, num, seed)
    else:
        raise UserError(
            f"no file or folder {source!r}, no id of a Hub dataset, and none of the prompt sets "
            f"{', '.join(PROMPT_SETS)}"
        )
    return replace(draw_prompts(collect_prompts(source, rows), num, seed), notes=notes)


def collect_prompts(source: str, rows: Iterable[object]) -> PromptSet:
    """Returns the unique prompts among `rows`, in order; UserError if there are none."""
    prompts: dict[str, None] = {}  # a set that keeps the order of first appearance
    left_out = Counter()
    for row in rows:
        if not isinstance(row, str) or LONE_SURROGATE.search(row):
            left_out["without text"] += 1
        elif not (prompt := row.strip()):
            left_out["empty"] += 1
        elif len(prompt) > LONGEST_PROMPT:
            left_out[f"of more than {LONGEST_PROMPT:,} characters"] += 1
        elif prompt in prompts:
            left_out["duplicates"] += 1
        else:
            prompts[prompt] = None
    found = PromptSet(source, tuple(prompts), len(prompts) + left_out.total(), left_out)
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


def _dataset_rows(place: Place) -> Iterator[object]:
    """Yields the prompts of a folder, or of a dataset on the Hub."""
    is_local = Path(place.source).is_dir()
    repo, _, revision = (place.source, "", "") if is_local else place.source.partition("@")
    try:
        if not is_local:
            tell_if_moved(repo, "dataset")
        if place.files:
            for name in place.files:
                path = hf_hub_download(repo, name, repo_type="dataset", revision=revision or None)
                yield from file_rows(Path(path), place.column)
            return
        rows = _open_dataset(repo, place.split, place.column, revision or None)
        for batch in tqdm(rows.iter(batch_size=1000), desc=repo, unit=" thousand rows"):
            yield from batch[place.column]
    except UserError:
        raise
    except Exception as error:  # of the network, the file systems or the builders
        keys = "prompts.source and prompts.split"
        raise dataset_error(error, place.source, place.split, keys) from error


def _open_dataset(source: str, split: str, column: str, revision: str | None):
    """Returns the one column of a split, a Dataset or an IterableDataset."""
    import datasets  # takes seconds, and a file of prompts does not need it

    saved = saved_split(source, split, alone=split)
    if saved is not None:
        check_column(source, column, saved.column_names)
        return saved.select_columns([column])
    options: dict[str, Any] = {"split": split, "revision": revision, "streaming": True}
    if Path(source).is_dir() and has_magic(folder := str(Path(source).resolve())):
        # `datasets` takes the folder's name for a pattern, too.
        found = datasets.data_files.get_data_patterns(escape(folder)).items()
        files = {name: [f"{escape(folder)}/{each}" for each in each_of] for name, each_of in found}
        options["data_files"] = files
    rows = datasets.load_dataset(source, **options)
    names = rows.column_names or list(next(iter(rows), {}))  # some formats tell only by a row
    check_column(source, column, names)
    try:  # Parquet then fetches this column only, and so no images
        return datasets.load_dataset(source, **options, columns=[column])
    except (TypeError, ValueError):  # other formats do not know `columns`
        return rows.select_columns([column])


def saved_split(source: str, split: str, alone: str):  # -> Dataset | None
    """Returns a split that `save_to_disk` wrote into the folder `source`, None for another source.

    A dataset that was saved without splits is its split `alone`. Raises UserError for no such split.
    """
    import datasets  # takes seconds, and a file of prompts does not need it

    if not any(Path(source, name).exists() for name in ("state.json", "dataset_dict.json")):
        return None
    saved = datasets.load_from_disk(source)
    splits = saved if isinstance(saved, datasets.DatasetDict) else {alone: saved}
    if split not in splits:
        raise UserError(f"{source} has no split {split!r}, only {', '.join(splits)}")
    return splits[split]


def _read_hub(place: Place, num: int, seed: int) -> PromptSet:
    """Returns a draw from the Hub, kept on disk so that the next run needs no time or network."""
    parts = (place.source, place.split, place.column, num or "all", f"seed{seed}")
    readable = re.sub(r"[^\w.-]+", "_", "-".join(map(str, parts)))[:120]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    file = assets("default") / f"{readable}-{digest}.json"
    if file.exists():
        name = f"{place.source}, as drawn before in {file}"
        return collect_prompts(name, file_rows(file, "caption"))
    drawn = draw_prompts(collect_prompts(place.source, _dataset_rows(place)), num, seed)
    rows = [{"caption": prompt} for prompt in drawn.prompts]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(rows).encode())
    except OSError as error:  # a full or read-only disk is no reason to stop
        logger.warning("this draw is not kept for the next run: %s", error)
    return drawn
