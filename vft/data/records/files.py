"""Files of records (JSON, JSONL, CSV, TSV, Parquet, Arrow), each record with the line or row where it begins."""

from __future__ import annotations

import codecs
import csv
import glob
import io
import json
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from vft.common.errors import UserError, missing
from vft.common.types import MediaRef, Sample, Turn
from vft.data.records.inputs import note
from vft.data.records.paths import PICTURE_SUFFIXES, SPLITS, VIDEO_SUFFIXES, is_stray
from vft.data.records.record import (
    TURN_KEYS,
    ParsedRecord,
    Record,
    RecordError,
    Records,
    as_object,
    make_samples,
    record_id,
    short_repr,
)
from vft.data.streaming.archives import open_file

TABLES = frozenset({".csv", ".tsv", ".tab"})
COLUMNAR = frozenset({".parquet", ".arrow"})
RECORD_SUFFIXES = frozenset({".json", ".jsonl"}) | TABLES | COLUMNAR
WORKBOOKS = frozenset({".xlsx", ".xls", ".xlsm", ".ods"})
ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".zst"})
EMPTY = frozenset({"", "nan", "NaN", "null", "NULL", "#N/A"})
"""Cells without a value, as pandas, SQL and Excel write them."""
DELIMITERS = ",;\t|"
MAX_ROWS = 10_000_000
"""Rows of a Parquet or Arrow file. A few kilobytes may announce any number, and records are held in memory."""
SNIFFED_CHARACTERS = 4096
"""Characters of a text in which another encoding is looked for."""
_most: ContextVar[int | None] = ContextVar("most", default=None)
_SPACE = re.compile(r"[ \t\r\n]*")
_SPLIT = re.compile(f"({'|'.join(SPLITS)})(?![a-z])", re.IGNORECASE)


def record_files(path: Path) -> list[tuple[Path, str]]:
    """The files of records at `path`, each with its name for messages.

    That is a file, the files that a pattern with `*` matches, or the Parquet or Arrow files in a data set's folder, as
    the hub and `save_to_disk` of datasets lay it out.

    Raises:
        UserError: there are none, or a folder holds several splits.
    """
    if not path.is_dir():
        if path.exists() or "*" not in path.name:
            return [(path, path.name)]
        matches = [Path(name) for name in sorted(glob.glob(str(path)))]
        if not matches:
            raise UserError(f"{path}: no file has such a name; check data.root and the source's path")
        return [(file, file.name) for file in matches if not is_stray(file.name)] or [(path, path.name)]
    named = [(file, name) for file, name in _files_below(path, COLUMNAR) if not file.name.startswith("cache-")]
    if not named:
        raise UserError(f"{path}: is a folder without .parquet or .arrow files; name a file of records")
    splits = {split.lower(): file for file, name in named for split in _split_of(name)}
    if len(splits) > 1:
        file = next(iter(splits.values()))
        one = file.parent if not _split_of(file.name) else file.with_name(f"{_SPLIT.split(file.name)[1]}*{file.suffix}")
        raise UserError(f'{path}: holds the splits {", ".join(splits)}; name one of them, such as "{one}"')
    return named


def _split_of(name: str) -> list[str]:
    """The split with which a file's name begins, or else the nearest folder's."""
    return [match[1] for part in name.split("/")[::-1] if (match := _SPLIT.match(part))][:1]


def json_files(path: Path) -> list[tuple[Path, str]]:
    """The file at `path`, or all JSON files below that folder; each with its name for messages, sorted by path.

    UserError if there are none.
    """
    if not path.is_dir():
        return [(path, path.name)]
    named = _files_below(path, {".json"})
    if not named:
        raise UserError(f"{path}: the folder has no .json files; give a file, or the folder that holds them")
    return named


def _files_below(folder: Path, suffixes: Collection[str]) -> list[tuple[Path, str]]:
    """The files with these suffixes at any depth, each with its name below the folder, sorted by path."""
    # Four times as fast as `rglob`: the folder may hold the videos too.
    inside = (os.path.join(inner, name) for inner, folders, names in os.walk(folder) for name in (*folders, *names))
    likely = [Path(path) for path in inside if path.lower().endswith(tuple(suffixes))]
    files = sorted(file for file in likely if file.suffix.lower() in suffixes)
    named = [(file, file.relative_to(folder).as_posix()) for file in files]
    return [(file, name) for file, name in named if not is_stray(name)]


@contextmanager
def at_most(records: int) -> Iterator[None]:
    """In it `read_records` ends after so many records of a file, which are enough to see what they are."""
    token = _most.set(records)
    try:
        yield
    finally:
        _most.reset(token)


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a file, each with the line where it begins, or its row in Parquet and Arrow, from 1.

    The file's suffix says its format; an unknown suffix means JSON. Empty cells are None. A line that is not a record
    comes as RecordError.

    Raises:
        UserError: the file cannot be read, or is not what its suffix says; names file and line.
    """
    return islice(_read_all(path), _most.get())


def _read_all(path: Path) -> Iterator[tuple[int, Any]]:
    suffix = path.suffix.lower()
    if suffix in WORKBOOKS:
        raise UserError(f"{path}: is a workbook of a spreadsheet; save its sheet as CSV UTF-8, and name that file")
    if suffix in VIDEO_SUFFIXES | PICTURE_SUFFIXES | ARCHIVES:
        kind, fix = ("an archive", "unpack it") if suffix in ARCHIVES else ("no file of records", "write one about it")
        raise UserError(f"{path}: is {kind}; {fix}, and name a JSON, JSONL or CSV file")
    if suffix in TABLES:
        names, rows = read_table(path)
        if not any(names):
            raise UserError(f"{path}: has no line of column names; write one, such as video,question,answer")
        yield from rows
    elif suffix in COLUMNAR:
        if not path.is_file():
            read_file(path, "a table")  # says what is wrong
        yield from enumerate(read_columnar(str(path)), 1)
    else:
        yield from read_json(path)


def read_samples(
    files: Iterable[tuple[Path, str]],
    parse: Callable[[Record, Path], ParsedRecord],
    normalize: Callable[[Record, Path], list[Record]] = lambda record, _: [record],
) -> Records:
    """Turn every record of `files` into a sample or a BadRecord.

    Args:
        files: Each file with its name for messages.
        parse: Makes the turns of a record of a file; raises RecordError.
        normalize: Makes one or more records in the form that `parse` knows out of a record; raises RecordError.

    Ids are as in `make_samples`; a record without one is called by its file and number.
    """

    def samples_of(row: tuple[Path, int, Any], origin: str) -> Iterator[Sample]:
        path, number, value = row
        for record in normalize(as_object(value), path):
            sample_id = record_id(record, f"{path.stem}-{number}")
            fields = {key: value for key, value in record.items() if key not in TURN_KEYS}
            parsed = parse(record, path)
            yield Sample(sample_id, parsed.turns, origin, fields | dict(parsed.fields), parsed.unread)

    rows = (
        (f"{name}:{line}", (path, number, record))
        for path, name in files
        for number, (line, record) in enumerate(read_records(path), 1)
    )
    return make_samples(rows, samples_of)


# ------------------------------------------------------------------------------------------------------------- text


def read_file(path: Path, what: str) -> bytes:
    """The content of a regular file; opening a FIFO would block. UserError if it cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise UserError(f"{path}: is no regular file; give the path of {what}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: {missing(path, 'file', f'give the path of {what}')}") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of {what}") from None


def decode_text(content: bytes, name: str) -> str:
    """The text of a file, without its byte-order mark: UTF-8, or UTF-16 with a mark, as Excel writes it.

    Raises:
        UserError: another encoding; names file and line.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
        start = text[:SNIFFED_CHARACTERS]
        if start.count("\0") > len(start) / 4:
            raise UserError(f"{name}:1: holds zero bytes, as UTF-16 without its mark does; save the file as UTF-8")
        return text
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fix = "save the file as UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8"
        raise UserError(f"{name}:{line}: byte {error.start} is not UTF-8; {fix}") from None


def read_text(path: Path) -> str:
    """The text of a file. UserError if it cannot be read or is not UTF-8; names file and line."""
    return decode_text(read_file(path, "a text file"), str(path))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, with their numbers from 1."""
    return [(i, line.strip()) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


# --------------------------------------------------------------------------------------------------- JSON and JSONL


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """The records of a JSON list, or of JSON objects one after another (JSONL), each with its first line, from 1.

    A line of JSONL that is not JSON comes as RecordError if a good one came before it.

    Raises:
        UserError: the file cannot be read, or is not JSON; names file and line.
    """
    yield from parse_json(read_file(path, "a JSON or JSONL file"), str(path))


def parse_json(content: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """As `read_json`, for the content of a file called `name`."""
    text = decode_text(content, name)
    line, counted = 1, 0

    def skip_space(position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        return match.end()

    def fail(position: int, what: str) -> NoReturn:
        at = line + text.count("\n", counted, position)
        if text.startswith(("#", "//", "/*"), position):
            raise UserError(f"{name}:{at}: a comment, which JSON does not have; take it out")
        raise UserError(f"{name}:{at}: {what}; each record must be a JSON object, in a list or on a line of its own")

    position = skip_space(0)
    in_list = text[position : position + 1] == "["
    position = skip_space(position + in_list)
    is_first = True
    while position < len(text) and not (in_list and text[position] == "]"):
        if in_list and not is_first:
            if text[position] != ",":
                fail(position, f"expected ',' or ']', found {short_repr(text[position : position + 20])}")
            position = skip_space(position + 1)
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # also a constant that JSON does not have, absurd nesting
            at, what = position, str(error)
            if isinstance(error, json.JSONDecodeError):
                at, what = error.pos, f"{error.msg}, found {short_repr(text[error.pos : error.pos + 20])}"
                if text[position : position + 1] == "," or text[max(0, at - 20) : at].rstrip().endswith(","):
                    what += "; a comma too many: take it out, or for commas between records put [ ] around all of them"
            if in_list or is_first:
                fail(at, what)
            # One broken line among many is one bad record.
            end = text.find("\n", position) % (len(text) + 1)
            record = RecordError("", f"{what}; each line must be a JSON object")
        yield line, record
        position, is_first = skip_space(end), False
    if in_list:
        if position == len(text):
            fail(position, "the list is not closed: the file is cut off")
        position = skip_space(position + 1)
        if position < len(text):
            fail(position, f"text after the end of the list: {short_repr(text[position : position + 20])}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


# ------------------------------------------------------------------------------------------------------ CSV and TSV


def read_table(path: Path) -> tuple[list[str], Iterator[tuple[int, Any]]]:
    """The names of the columns of a CSV or TSV file, and its rows as `read_records` gives them."""
    text = decode_text(read_file(path, "a table"), str(path))
    if text.lstrip()[:1] in ("{", "["):
        raise UserError(f"{path}: holds JSON, not a table; name it {path.with_suffix('.jsonl')}")
    separator = re.match(r"sep=(.)\r?\n", text)  # Excel's own first line
    start = separator.end() if separator else 0
    delimiter = separator[1] if separator else _delimiter(text)
    rows = _csv_rows(text[start:], delimiter, str(path), 2 if separator else 1)
    line, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    if values := [name for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES | PICTURE_SUFFIXES]:
        first = f"the first line holds {short_repr(values[0])} and no names of columns"
        raise UserError(
            f"{path}:{line}: {first}; put a line before it, such as video{delimiter}question{delimiter}answer"
        )
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path}:{line}: two columns are called {short_repr(twice[0])}; rename one of them")

    def record_of(row: list[str]) -> Record | RecordError:
        if len(row) != len(names):
            what = f"{len(row)} values under {len(names)} columns"
            return RecordError("", f"{what}; put quotes around a value that holds {delimiter!r}")
        return {name: None if cell in EMPTY else cell for name, cell in zip(names, row, strict=True) if name}

    return names, ((line, record_of(row)) for line, row in rows if any(row) or len(row) != len(names))


def _csv_rows(text: str, delimiter: str, name: str, line: int = 1) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV text that are not blank, each with its first line; quoted values may hold line breaks.

    Raises:
        UserError: broken quotes; names file and line.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    first = line
    try:
        for row in reader:
            if row:
                yield line, [cell.strip(" \t") for cell in row]
            line = first + reader.line_num
    except csv.Error as error:
        raise UserError(f"{name}:{line}: {error}; fix the quotes of this row") from None


def _delimiter(text: str) -> str:
    """The character that separates the names in the first line, outside of quotes."""
    header = re.sub(r'"[^"]*"', "", text[: text.find("\n") % (len(text) + 1)])
    return max(DELIMITERS, key=header.count)


# ------------------------------------------------------------------------------------------------ Parquet and Arrow


def read_columnar(name: str, columns: tuple[str, ...] = (), max_rows: int = MAX_ROWS) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or Arrow file, local or `hf://`, with values as JSON has them: no NaN, a class by name.

    Raises:
        UserError: damaged, more than `max_rows`, or without one of `columns`.
    """
    try:
        with open_file(name) as file:
            schema, num_rows, batches = (_open_arrow if name.lower().endswith(".arrow") else _open_parquet)(file)
            if num_rows > max_rows:
                raise ValueError(f"{num_rows} rows, more than {max_rows}; split it")
            if missing := [column for column in columns if column not in schema.names]:
                raise UserError(f"{name}: no column {', '.join(missing)}; found {str(schema.names)[:300]}")
            classes = _class_names(schema)
            for batch in batches:
                for row in batch.to_pylist():
                    yield {key: _json_value(value, classes.get(key)) for key, value in row.items()}
    except UserError:
        raise
    except Exception as error:  # of pyarrow, odd times and texts, the hub's client, its network: no class in common
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{name}: can't be read ({reason}); download or write it again, or check the network") from None


Table = tuple[Any, int, Iterator[Any]]
"""Schema, number of rows (0 if it is not known), batches."""


def _open_parquet(file: Any) -> Table:
    opened = pq.ParquetFile(file)
    return opened.schema_arrow, opened.metadata.num_rows, opened.iter_batches(batch_size=1024)


def _open_arrow(file: Any) -> Table:
    """A stream, as `save_to_disk` of datasets writes it, or Arrow's file format."""
    try:
        stream = pa.ipc.open_stream(file)
        return stream.schema, 0, iter(stream)
    except pa.ArrowInvalid:
        opened = pa.ipc.open_file(file)
        return opened.schema, 0, map(opened.get_batch, range(opened.num_record_batches))


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The class names of each `ClassLabel` column, as datasets keeps them in a schema."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"].items()
    except (ValueError, LookupError, TypeError, AttributeError):  # not written by datasets
        return {}
    return {
        name: feature["names"]
        for name, feature in features
        if isinstance(feature, dict) and isinstance(feature.get("names"), list)
    }


def _json_value(value: Any, names: list[str] | None) -> Any:
    if isinstance(value, float) and math.isnan(value):
        return None
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value


# --------------------------------------------------------------------------------------------------- lists of classes


def labelled_sample(
    sample_id: str,
    ref: MediaRef,
    label: str,
    labels: tuple[str, ...],
    origin: str,
    unread: Iterable[str] = (),
    **fields: str,
) -> Sample:
    """A clip and its class, without a question: the task asks. `labels` are all classes of the set, `unread` the keys
    of the record that the format does not read."""
    turns = (Turn("user", (ref,)), Turn("assistant", (label,)))
    return Sample(sample_id, turns, origin, {"label": label, "labels": labels, **fields}, tuple(unread))


def label_classes(names: Iterable[str], to_label: Callable[[str], str], path: Path) -> dict[str, str]:
    """The label of each class name.

    Raises:
        UserError: two names have the same label, or one has none; names `path`, where they come from.
    """
    names_of: dict[str, str] = {}
    for name in names:
        label = to_label(name)
        if not label:
            raise UserError(f"{path}: class {short_repr(name)} gives an empty label; rename it")
        if names_of.setdefault(label, name) != name:
            both = f"{short_repr(names_of[label])} and {short_repr(name)}"
            raise UserError(f"{path}: classes {both} give the same label {short_repr(label)}; rename one of them")
    return {name: label for label, name in names_of.items()}


def read_classes(*folders: Path) -> tuple[Path, list[str]] | None:
    """The first `classes.txt` (a name a line) in `folders`, and its names. None if there is none."""
    for folder in folders:
        path = folder / "classes.txt"
        note(path)
        if path.is_file():
            names = [line for _, line in read_lines(path)]
            if not names:
                raise UserError(f"{path}: holds no names; write a class a line, or take the file away")
            return path, names
    return None
