"""Files of records: JSON, JSONL, CSV, TSV, Parquet and Arrow, each record with the line or row where it stands."""

from __future__ import annotations

import csv
import glob
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vft.common.errors import UserError
from vft.data.file_names import SPLITS, is_stray
from vft.data.formats.records import (
    PICTURE_SUFFIXES,
    VIDEO_SUFFIXES,
    Malformed,
    decode_text,
    read_file,
    read_json,
    shown,
)

TABLES = frozenset({".csv", ".tsv", ".tab"})
COLUMNAR = frozenset({".parquet", ".arrow"})
SUFFIXES = frozenset({".json", ".jsonl"}) | TABLES | COLUMNAR
"""Of files of records."""
EMPTY = frozenset({"", "nan", "NaN", "null", "NULL", "#N/A"})
"""Cells without a value, as pandas, SQL and Excel write them."""
DELIMITERS = ",;\t|"
MAX_ROWS = 10_000_000
"""A file of a few kilobytes may announce any number, and records are held in memory."""
_SPLIT = re.compile(f"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)


def files_of(path: Path) -> list[tuple[Path, str]]:
    """The files of records at `path`, with their names for messages: a file, those that a pattern with `*` fits, or
    those of a data set's folder in Parquet or Arrow, as the hub and `save_to_disk` of datasets lay it out.

    Raises:
        UserError: there are none, or a folder holds several splits.
    """
    if not path.is_dir():
        if path.exists() or "*" not in path.name:
            return [(path, path.name)]
        found = [Path(name) for name in sorted(glob.glob(str(path)))]
        if not found:
            raise UserError(f"{path}: no file has such a name; check data.root and the source's path")
        return [(file, file.name) for file in found if not is_stray(file.name)] or [(path, path.name)]
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in COLUMNAR)
    named = [(file, file.relative_to(path).as_posix()) for file in inside if not file.name.startswith("cache-")]
    named = [(file, name) for file, name in named if not is_stray(name)]
    if not named:
        raise UserError(f"{path}: is a folder without .parquet or .arrow files; name a file of records")
    splits = {split.lower(): file for file, name in named for split in _split_of(name)}
    if len(splits) > 1:
        file = next(iter(splits.values()))
        one = file.parent if not _split_of(file.name) else file.with_name(f"{_SPLIT.split(file.name)[1]}*{file.suffix}")
        raise UserError(f'{path}: holds the splits {", ".join(splits)}; name one of them, such as "{one}"')
    return named


def _split_of(name: str) -> list[str]:
    """The split that a file's name begins with, or a folder's above it."""
    return [match[1] for part in name.split("/")[::-1] if (match := _SPLIT.match(part))][:1]


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Each record of a file and where it begins: a line, of Parquet and Arrow a row, from 1. By the file's suffix; one
    of another suffix is JSON.

    Empty cells are None. A line that is no record comes as `Malformed`.

    Raises:
        UserError: the file can't be read, or isn't what its suffix says; names file and line.
    """
    suffix = path.suffix.lower()
    if suffix in TABLES:
        yield from _read_table(path)
    elif suffix in COLUMNAR:
        yield from enumerate(_read_columnar(path), 1)
    else:
        yield from read_json(path)


# ------------------------------------------------------------------------------------------------------ CSV and TSV


def _read_table(path: Path) -> Iterator[tuple[int, Any]]:
    text = decode_text(read_file(path, "a table"), str(path))
    said = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    start = said.end() if said else 0
    delimiter = said[1] if said else _delimiter(text)
    rows = split_rows(text[start:], delimiter, str(path), 2 if said else 1)
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    if values := [name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES | PICTURE_SUFFIXES]:
        first = f"the first line holds {shown(values[0])} and no names of columns"
        raise UserError(
            f"{path}:{line}: {first}; put a line before it, such as video{delimiter}question{delimiter}answer"
        )
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path}:{line}: two columns are called {shown(twice[0])}; rename one of them")
    if not any(names):
        raise UserError(f"{path}: has no line of column names; write one, such as video,question,answer")
    for line, row in rows:
        cells = [cell.strip(" \t") for cell in row]
        if len(cells) != len(names):
            what = f"{len(cells)} values under {len(names)} columns"
            yield line, Malformed(f"{what}; put quotes around a value that holds {delimiter!r}")
        elif any(cells):
            cells_or_none = (None if cell in EMPTY else cell for cell in cells)
            yield line, {name: cell for name, cell in zip(names, cells_or_none, strict=True) if name}


def split_rows(text: str, delimiter: str, name: str, line: int = 1) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV text that are not blank, with the line where each begins; quoted values may hold line breaks.

    Raises:
        UserError: broken quotes; names file and line.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    first = line
    try:
        for row in reader:
            if row:
                yield line, row
            line = first + reader.line_num
    except csv.Error as error:
        raise UserError(f"{name}:{line}: {error}; mend the quotes of this row") from None


def _delimiter(text: str) -> str:
    """What parts the names in the first line, outside of quotes."""
    header = re.sub(r'"[^"]*"', "", text[: text.find("\n") % (len(text) + 1)])
    return max(DELIMITERS, key=header.count)


# -------------------------------------------------------------------------------------------------- Parquet and Arrow


def _read_columnar(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        read_file(path, "a table")  # says what is wrong
    try:
        with pa.memory_map(str(path)) as file:
            schema, count, batches = (_parquet if path.suffix.lower() == ".parquet" else _arrow)(file)
            if count > MAX_ROWS:
                raise UserError(f"{path}: {count} rows, more than {MAX_ROWS}; split it")
            classes = _class_names(schema)
            for batch in batches:
                for row in batch.to_pylist():
                    yield {name: _plain(value, classes.get(name)) for name, value in row.items()}
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two of odd times and texts
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: can't be read ({reason}); download or write it again") from None


Table = tuple[Any, int, Iterator[Any]]
"""Schema, number of rows (0 where nobody says) and batches."""


def _parquet(file: Any) -> Table:
    opened = pq.ParquetFile(file)
    return opened.schema_arrow, opened.metadata.num_rows, opened.iter_batches(batch_size=1024)


def _arrow(file: Any) -> Table:
    """A stream, as `save_to_disk` of datasets writes it, or Arrow's file format."""
    try:
        opened = pa.ipc.open_stream(file)
        return opened.schema, 0, iter(opened)
    except pa.ArrowInvalid:
        found = pa.ipc.open_file(file)
        return found.schema, 0, map(found.get_batch, range(found.num_record_batches))


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names behind the numbers of each `ClassLabel` column, as datasets keeps them in a schema."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"].items()
    except (ValueError, LookupError, TypeError, AttributeError):  # no such note, or not of datasets
        return {}
    return {
        name: one["names"] for name, one in features if isinstance(one, dict) and isinstance(one.get("names"), list)
    }


def _plain(value: Any, names: list[str] | None) -> Any:
    """A value as JSON would have it: no NaN, a class by its name."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value
