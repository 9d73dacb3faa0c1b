"""Leaves out labelled pairs on which other judges disagree with people: LPO, arXiv 2502.01051."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from spo.errors import UserError, first_line
from spo.hub import resolve_file

FILTERED_OUT = "filtered out"
SCORES = pa.schema(
    {
        "different_flag": pa.int8(),  # 1: there is a winner, 0: a tie
        # The winner's score less the loser's; of a tie the size of the difference.
        "aesthetic_gap": pa.float64(),  # points
        "clipscore_gap": pa.float64(),  # cosine
        "vqascore_gap": pa.float64(),  # probability
    }
)
_WINNER = {1: 0.0, 2: -0.5, 3: -1.0}  # by strategy; a winner's aesthetic_gap, others 0, are above
_TIE = {"aesthetic_gap": 0.2, "clipscore_gap": 0.03, "vqascore_gap": 0.07}


def passing(scores: Mapping[str, np.ndarray], strategy: int) -> np.ndarray:
    """Returns (n,) bool: the rows that pass, of the columns (n,) of `SCORES`.

    NaN fails, but a VQA score that all rows lack is not asked for. The official code compares the gaps
    of ties as they are; magnitudes must be meant, or the better image's place would matter.
    """
    no_vqa = np.isnan(scores["vqascore_gap"]).all()
    above = {"aesthetic_gap": _WINNER[strategy], "clipscore_gap": 0.0, "vqascore_gap": 0.0}
    names = [name for name in above if not (no_vqa and name == "vqascore_gap")]
    wins = np.all([scores[name] > above[name] for name in names], axis=0)
    ties = np.all([scores[name] < _TIE[name] for name in names], axis=0)
    different = scores["different_flag"]
    return np.where(different == 1, wins, ties & (different == 0))


@dataclass(frozen=True)
class RowFilter:
    """The rows of a split that pass, and which have a winner, by the file `data.filter`."""

    file: str
    different: np.ndarray  # (rows,) 1: there is a winner, 0: a tie, NaN: not scored
    passing: np.ndarray  # (rows,) bool

    def apply(self, usable: Sequence[int], rows: Dataset) -> list[int]:
        """Returns the `usable` indices that pass; UserError if the file is not of these rows."""
        again = "make it of this split by scripts/filter_pairs.py"
        if len(self.passing) != len(rows):
            counts = f"has {len(self.passing):,} rows, but the split {len(rows):,}"
            raise UserError(f"data.filter: {self.file} {counts}; {again}.")
        labels = rows.select_columns(["label_0"]).with_format("arrow")[:]["label_0"].to_pylist()
        for index in usable:
            if self.different[index] == (labels[index] == 0.5):
                reason = f"takes row {index} for a tie or a winner, which it is not"
                raise UserError(f"data.filter: {self.file} {reason}; {again}.")
        return [index for index in usable if self.passing[index]]


def read_filter(file: str, strategy: int) -> RowFilter:
    """Returns the filter in a path or hf://user/repo/file; raises UserError that names data.filter."""
    path = resolve_file(file, "data.filter")
    try:
        table = pq.read_table(path)
        if missing := [name for name in SCORES.names if name not in table.column_names]:
            raise UserError(f"data.filter: {file} has no column {', '.join(missing)}.")
        scores = {n: table[n].cast(pa.float64()).to_numpy() for n in SCORES.names}
    except (OSError, pa.ArrowException) as error:
        reason = f"is no .parquet file of scores ({first_line(error)})"
        raise UserError(f"data.filter: {file} {reason}.") from error
    return RowFilter(file, scores["different_flag"], passing(scores, strategy))
