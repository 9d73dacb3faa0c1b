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

from huggingface_hub import constants, hf_hub_download
from tqdm import tqdm

from spo.atomic import write_file
from spo.data.prompt_files import READERS, check_column, file_rows
from spo.errors import UserError, first_line, in_one_line
from spo.hub import PREFETCH, is_hub_id

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half an emoji: no tokenizer or file takes it

# Prompt sets that papers evaluate on: name -> dataset, split, column.
_DATASETS = {
    "pickapic_v2": ("yuvalkirstain/pickapic_v2", "test_unique", "caption"),
    "partiprompts": ("nateraw/parti-prompts", "train", "Prompt"),
}
_HPDV2 = "zhwang/HPDv2"
_HPDV2_FILES = ("anime", "concept-art", "paintings", "photo")  # 800 prompts each

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSet:
    """Unique prompts, and the numbers of rows that were read and left out."""

    source: str
    prompts: tuple[str, ...]
    rows: int
    left_out: Counter  # rows, by the reason
    seed: int | None = None  # of the draw; None: all unique prompts

    def describe(self) -> str:
        """Returns one line for the log."""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        notes = [f"{self.rows:,} rows", *([f"{counts} left out"] if counts else [])]
        if self.seed is not None:
            notes.append(f"{len(self.prompts):,} drawn with seed {self.seed}")
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


def read_prompt_set(source: str, split: str, column: str, num: int, seed: int) -> PromptSet:
    """Returns the prompts of a named set, or of any source that `read_prompts` takes."""
    if source == "hpdv2":
        return draw_prompts(collect_prompts(_HPDV2, _hpdv2_rows()), num, seed)
    source, split, column = _DATASETS.get(source, (source, split, column))
    return read_prompts(source, split=split, column=column, num=num, seed=seed)


def _hpdv2_rows() -> Iterator[object]:
    """Yields the benchmark prompts of HPDv2 (Wu et al., arXiv 2306.09341), style by style."""
    for style in _HPDV2_FILES:
        name = f"benchmark/{style}.json"
        try:
            path = hf_hub_download(_HPDV2, name, repo_type="dataset")
        except Exception as error:  # of whatever network library the Hub's client uses
            reason = f"cannot download {name} of {_HPDV2} ({first_line(error)})"
            raise UserError(f"prompts.source: {reason}.") from error
        yield from file_rows(Path(path), "prompt")


def collect_prompts(source: str, rows: Iterable[object]) -> PromptSet:
    """Returns the unique prompts among `rows`, in order; UserError if there are none."""
    prompts: dict[str, None] = {}  # a set that keeps the order of first appearance
    left_out = Counter()
    for row in rows:
        if not isinstance(row, str) or LONE_SURROGATE.search(row):
            left_out["without text"] += 1
        elif not (prompt := row.strip()):
            left_out["empty"] += 1
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


def _dataset_rows(source: str, split: str, column: str) -> Iterator[object]:
    try:
        rows = _open_dataset(source, split, column)
        for batch in tqdm(rows.iter(batch_size=1000), desc=source, unit=" thousand rows"):
            yield from batch[column]
    except UserError:
        raise
    except Exception as error:  # of the network, the file systems or the builders
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        advice = "check prompts.source and prompts.split"
        if not Path(source).is_dir():
            advice += f", or fetch it while online: `{PREFETCH}`"
        raise UserError(
            f"cannot read dataset {source!r}, split {split!r} ({reason}); {advice}"
        ) from error


def _open_dataset(source: str, split: str, column: str):  # -> Dataset | IterableDataset
    import datasets  # takes seconds, and a file of prompts does not need it

    saved = saved_split(source, split, alone=split)
    if saved is not None:
        check_column(source, column, saved.column_names)
        return saved.select_columns([column])
    options = {"split": split, "streaming": True}
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


def _read_hub(source: str, split: str, column: str, num: int, seed: int) -> PromptSet:
    """Returns a draw from the Hub, kept on disk so that the next run needs no time or network."""
    parts = (source, split, column, num or "all", f"seed{seed}")
    readable = re.sub(r"[^\w.-]+", "_", "-".join(map(str, parts)))[:120]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
    file = Path(constants.HF_ASSETS_CACHE, "spo", "prompts", "default", f"{readable}-{digest}.json")
    if file.exists():
        return collect_prompts(f"{source}, as drawn before in {file}", file_rows(file, "caption"))
    drawn = draw_prompts(collect_prompts(source, _dataset_rows(source, split, column)), num, seed)
    rows = [{"caption": prompt} for prompt in drawn.prompts]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(rows).encode())
    except OSError as error:  # a full or read-only disk is no reason to stop
        logger.warning("this draw is not kept for the next run: %s", error)
    return drawn
