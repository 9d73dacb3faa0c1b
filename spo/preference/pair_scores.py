"""Scores labelled pairs by the judges of the multi-preference filter, row by row of a split."""

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from spo.atomic import append_line, naming, replacing, whole_lines, write_lines
from spo.errors import UserError, first_available
from spo.hub import model_file
from spo.preference.batches import Row, read_image
from spo.preference.filter import SCORES, read_filter
from spo.preference.rows import fault_of, label_rows
from spo.preference.source import IMAGE_COLUMNS, PairData, open_split, sources_of
from spo.scorers import Scorer, check_scorer, image_scorer, load_scorer

JUDGES = ("aesthetic", "clipscore")  # scorers; `VQAScore` beside them if a model is named
_AHEAD = 2  # batches that are decoded while the device is busy

Gaps = dict[str, float]  # a row of `SCORES`, empty if the pair cannot be scored
Pair = tuple[Image.Image, Image.Image]


@dataclass(frozen=True)
class Scoring:
    """Names the judges, and the number of pairs that they score at once."""

    options: Mapping[str, Mapping[str, Any]]  # of a judge's factory, by its name
    vqa: str  # a model that answers questions about images; empty: none
    batch_size: int

    def load(self, device: torch.device) -> dict[str, Scorer]:
        """Returns the judges by their columns; raises UserError before the first one loads."""
        sources = [image_scorer(name, self.options.get(name, {})) for name in JUDGES]
        for source in sources:
            check_scorer(source)
        if self.vqa:
            model_file(self.vqa, "config.json", "--vqa")
        found = {f"{source.name}_gap": load_scorer(source, device) for source in sources}
        if self.vqa:
            from spo.scorers.vqascore import VQAScore

            found["vqascore_gap"] = VQAScore(device, self.vqa)
        return found


def score_split(
    data: PairData, split: str, scoring: Scoring, output: Path, device: torch.device
) -> str:
    """Writes the scores of a split, one row for each of its rows, and returns a summary.

    Goes on where an earlier call was killed. Raises UserError for a source, model or journal that
    does not fit.
    """
    if data.streaming:
        raise UserError("data.streaming: the scores are those of a table; set it to False.")
    judges = scoring.load(device)
    rows, failed = first_available(sources_of(data), lambda each: open_split(each, split))
    if rows is None:
        raise UserError("; then ".join(failed))
    journal = output.with_name(f"{output.name}.partial.jsonl")
    scores = _resume(journal, rows, scoring)
    with tqdm(total=len(rows), initial=len(scores), desc="pairs", unit="pair") as bar:
        for batch, pairs in _read_ahead(rows, len(scores), scoring.batch_size, data.num_workers):
            found = score_pairs(batch, pairs, judges)
            with naming(journal):
                append_line(journal, json.dumps(found))
            scores += found
            bar.update(len(found))
    with replacing(output) as partial:
        pq.write_table(pa.Table.from_pylist(scores, schema=SCORES), partial)
    journal.unlink()
    passing = (f"{read_filter(str(output), s).passing.sum():,} by strategy {s}" for s in (1, 2, 3))
    scored = f"{sum(map(bool, scores)):,} of {len(scores):,} rows scored"
    return f"{output}: {scored}; of them pass {', '.join(passing)}"


def score_pairs(
    rows: Sequence[Row], pairs: Sequence[Pair | None], judges: Mapping[str, Scorer]
) -> list[Gaps]:
    """Returns the gaps of rows and their images; none of a pair that is None or has a score NaN."""
    sound = [(i, pair) for i, pair in enumerate(pairs) if pair is not None]
    found: list[Gaps] = [{} for _ in rows]
    if not sound:
        return found
    images = [image for _, pair in sound for image in pair]
    prompts = [rows[i]["caption"] for i, _ in sound for _ in range(2)]
    labels = torch.tensor([float(rows[i]["label_0"]) for i, _ in sound])
    gaps = {}
    for name, judge in judges.items():
        scores = judge.score_images(images, prompts).double().view(-1, 2)
        difference = scores[:, 0] - scores[:, 1]
        signed = difference * (2 * labels - 1)
        gaps[name] = torch.where(labels == 0.5, difference.abs(), signed).tolist()
    for (i, _), *own in zip(sound, *gaps.values(), strict=True):
        if all(map(math.isfinite, own)):
            is_tie = rows[i]["label_0"] == 0.5
            found[i] = {"different_flag": int(not is_tie), **dict(zip(gaps, own, strict=True))}
    return found


def _resume(journal: Path, rows: Dataset, scoring: Scoring) -> list[Gaps]:
    """Returns the scores in a journal, started if there is none; a kill may have cut its last line."""
    digest = hashlib.sha256()
    for row in label_rows(rows):
        digest.update(json.dumps(row, default=str).encode())
    of_what = {"rows": digest.hexdigest(), "options": scoring.options, "vqa": scoring.vqa}
    wanted = json.dumps(of_what, sort_keys=True)
    first, *lines = whole_lines(journal) or [wanted]
    if first != wanted:
        raise UserError(
            f"--output: {journal} has scores of other rows, or by other scorers: delete it to score "
            "anew, or name another file."
        )
    write_lines(journal, [first, *lines])
    return [gaps for line in lines for gaps in json.loads(line)]


def _read_ahead(
    rows: Dataset, start: int, size: int, workers: int
) -> Iterator[tuple[list[Row], list[Pair | None]]]:
    """Yields the rows from `start` on in batches, with their images decoded ahead by threads."""
    starts = range(start, len(rows), size)
    batches = ([rows[i] for i in range(at, min(at + size, len(rows)))] for at in starts)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        decoding = ((batch, pool.map(_read_pair, batch)) for batch in batches)
        pending = deque(islice(decoding, _AHEAD))
        while pending:
            batch, pairs = pending.popleft()
            yield batch, list(pairs)
            pending.extend(islice(decoding, 1))


def _read_pair(row: Row) -> Pair | None:
    """Returns the whole images of a row; None if the row or one of them is damaged."""
    try:
        return None if fault_of(row) else tuple(read_image(row[name]) for name in IMAGE_COLUMNS)
    except ValueError:
        return None
