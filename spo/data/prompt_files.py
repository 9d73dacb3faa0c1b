"""Reads the rows of prompt files: .json, .jsonl, .txt, .csv and .parquet."""

import csv
import io
import json
from collections.abc import Collection, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spo.errors import UserError


def file_rows(path: Path, column: str) -> Iterator[object]:
    """Yields the value of `column` in each row, text or not.

    Raises UserError that names the file and the fault.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; known are {', '.join(READERS)}")
    if not path.is_file():
        raise UserError(f"no file {path} (the working directory is {Path.cwd()})")
    try:
        yield from reader(path, column)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def check_column(source: object, column: str, names: Collection[object]) -> None:
    """Raises UserError that lists the columns `names` unless `column` is one of them."""
    if column not in names:
        there = ", ".join(sorted(map(repr, names))[:20]) or "none at all"
        raise UserError(f"{source} has no column {column!r} (there: {there}); set prompts.column")


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


def _txt_rows(path: Path, column: str) -> Iterator[str]:
    # str.splitlines would also split at characters that a prompt may hold, such as U+2028.
    return io.StringIO(_text(path))


def _json_rows(path: Path, column: str) -> list[object]:
    content = json.loads(_text(path))
    if not isinstance(content, list):
        raise ValueError(f"no list of strings or of {{{column!r}: ...}} in it")
    return _pick(path, column, content)


def _jsonl_rows(path: Path, column: str) -> list[object]:
    rows = []
    for number, line in enumerate(_txt_rows(path, column), start=1):
        try:
            rows.append(json.loads(line.strip() or '""'))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
    return _pick(path, column, rows)


def _pick(path: Path, column: str, rows: list[object]) -> list[object]:
    names = {name for row in rows if isinstance(row, dict) for name in row}
    if names:
        check_column(path, column, names)
    return [row.get(column) if isinstance(row, dict) else row for row in rows]


def _csv_rows(path: Path, column: str) -> Iterator[object]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    check_column(path, column, reader.fieldnames or ())
    for row in reader:
        if any(row.get(None, ())):  # an unquoted comma would silently cut the prompt
            raise ValueError(f"line {reader.line_num} has too many fields; quote its commas")
        yield row[column]


def _parquet_rows(path: Path, column: str) -> Iterator[object]:
    with pq.ParquetFile(path) as file:
        check_column(path, column, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[column]):
            yield from batch.column(0).to_pylist()


READERS = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".txt": _txt_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
