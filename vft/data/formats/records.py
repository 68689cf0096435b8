"""Reading JSON and JSONL with line numbers, and turning the paths in records into files inside `data.root`."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vft.common.errors import UserError
from vft.common.types import Sample, Turn
from vft.data.file_names import is_stray, spellings, without_drive

Row = TypeVar("Row")

_SPACE = re.compile(r"[ \t\r\n]*")
_DIGITS = re.compile(r"([0-9]+)")
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://|(?:file|data|https?):")

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".wmv", ".flv", ".3gp"}
    | {".ogv"}
)
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"})


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that can't be used: where it stands (`train.json:12`), the field at fault, what is wrong, the mend."""

    origin: str
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.field}: {self.message}" if self.field else f"{self.origin}: {self.message}"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reader makes of one record."""

    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()
    """Keys that it doesn't read."""


@dataclass(frozen=True, slots=True)
class Group:
    """All that one clip of an archive gives: its records, and its files, copied out for the time being."""

    place: int
    """Where the clip begins in its archive."""
    samples: list[Sample]
    bad: list[BadRecord]
    files: tuple[Path, ...]


class RecordError(Exception):
    """Raised while one record is read; the reader makes a BadRecord of it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        # A key of the user's may hold line breaks, or what can't be written at all.
        self.field, self.message = field if field.isprintable() else ascii(field), message


def shown(value: object) -> str:
    """A value in a message: its start, on one line."""
    text = ascii(value) if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def names_in(record: Mapping[str, Any]) -> str:
    """The keys of a record in a message."""
    return f"{', '.join(map(shown, record)):.300}" or "no fields"


TURN_KEYS = ("messages", "conversations")
"""Keys of a record's turns."""
CHECKED = 4096
"""Characters in which text of another encoding shows."""
TOO_DEEP = "is nested too deeply; each record must be a JSON object of a few levels"


class Malformed(str):
    """What is wrong with a line of JSONL, in the place of its record."""


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Each record of a JSON list or of JSON objects one behind another (JSONL), with the line where it starts, from 1.

    A line of JSONL that isn't JSON comes as `Malformed`, where a good one came before it.

    Raises:
        UserError: the file can't be read, or isn't JSON; names file and line.
    """
    yield from parse_json(read_file(path, "a JSON or JSONL file"), str(path))


def read_file(path: Path, what: str) -> bytes:
    """The content of a regular file; a FIFO would block whoever opens it. UserError where it can't be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise UserError(f"{path}: is no regular file; give the path of {what}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of {what}") from None


def decode_text(content: bytes, name: str) -> str:
    """The text of a file, without a byte-order mark: UTF-8, or UTF-16 that begins with its mark, as Excel writes it.

    Raises:
        UserError: another encoding; names file and line.
    """
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
        if text[:CHECKED].count("\0") > len(text[:CHECKED]) / 4:
            raise UserError(f"{name}:1: holds zero bytes, as UTF-16 without its mark does; save the file as UTF-8")
        return text
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        mend = "save the file as UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8"
        raise UserError(f"{name}:{line}: byte {error.start} is not UTF-8; {mend}") from None


def parse_json(content: bytes, name: str) -> Iterator[tuple[int, Any]]:
    """As `read_json`, of a file called `name` with this content."""
    text = decode_text(content, name)
    line, counted = 1, 0

    def skip_space(position: int) -> int:
        match = _SPACE.match(text, position)
        assert match is not None
        return match.end()

    def fail(position: int, what: str) -> NoReturn:
        at = line + text.count("\n", counted, position)
        raise UserError(f"{name}:{at}: {what}; each record must be a JSON object, in a list or on a line of its own")

    position = skip_space(0)
    in_list = text[position : position + 1] == "["
    position = skip_space(position + in_list)
    is_first = True
    while position < len(text) and not (in_list and text[position] == "]"):
        if in_list and not is_first:
            if text[position] != ",":
                fail(position, f"expected ',' or ']', found {shown(text[position : position + 20])}")
            position = skip_space(position + 1)
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # also a constant that JSON does not have, absurd nesting
            at, what = position, str(error)
            if isinstance(error, json.JSONDecodeError):
                at, what = error.pos, f"{error.msg}, found {shown(text[error.pos : error.pos + 20])}"
            if in_list or is_first:
                fail(at, what)
            # One broken line of many is one bad record.
            end = text.find("\n", position) % (len(text) + 1)
            record = Malformed(f"{what}; each line must be a JSON object")
        yield line, record
        position, is_first = skip_space(end), False
    if in_list:
        if position == len(text):
            fail(position, "the list is not closed: the file is cut off")
        position = skip_space(position + 1)
        if position < len(text):
            fail(position, f"text after the end of the list: {shown(text[position : position + 20])}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


# ---------------------------------------------------------------------------------------------------------- samples


def collect(
    files: Iterable[tuple[Path, str]],
    parse: Callable[[Mapping[str, Any], Path], Parsed],
    read: Callable[[Path], Iterable[tuple[int, Any]]] = read_json,
    expand: Callable[[dict[str, Any], Path], list[dict[str, Any]]] = lambda record, _: [record],
) -> tuple[list[Sample], list[BadRecord]]:
    """Read files, given with their name for messages, and turn each record into a sample or a BadRecord.

    `parse` gets a record and its file, and raises RecordError. `expand` makes of a record, with its file, those that it
    stands for. Ids as in `gather`.
    """

    def samples_of(row: tuple[Path, int, Any], origin: str) -> Iterator[Sample]:
        path, number, record = row
        for one in expand(as_object(record), path):
            name = sample_id_of(one, f"{path.stem}-{number}")
            fields = {key: value for key, value in one.items() if key not in TURN_KEYS}
            parsed = parse(one, path)
            yield Sample(name, parsed.turns, origin, fields, parsed.unread)

    rows = (
        (f"{name}:{line}", (path, number, record))
        for path, name in files
        for number, (line, record) in enumerate(read(path), 1)
    )
    return gather(rows, samples_of)


def gather(
    rows: Iterable[tuple[str, Row]], parse: Callable[[Row, str], Iterable[Sample]]
) -> tuple[list[Sample], list[BadRecord]]:
    """Turn rows, given with their origin, into samples, or a BadRecord where `parse(row, origin)` raises RecordError.

    An id that came before gets a number: `x`, `x#2`, ...
    """
    samples: list[Sample] = []
    bad: list[BadRecord] = []
    seen: dict[str, int] = {}
    for origin, row in rows:
        try:
            made = list(parse(row, origin))
        except RecordError as error:
            bad.append(BadRecord(origin, error.field, error.message))
        except RecursionError:
            bad.append(BadRecord(origin, "", TOO_DEEP))
        else:
            samples += [replace(sample, id=unique(sample.id, seen)) for sample in made]
    return samples, bad


def as_object(record: object) -> dict[str, Any]:
    """`record` if it is a JSON object."""
    if isinstance(record, Malformed):
        raise RecordError("", str(record))
    if not isinstance(record, dict):
        raise RecordError("", f"{shown(record)} is no JSON object; each record must be one")
    return record


def sample_id_of(record: Mapping[str, Any], default: str) -> str:
    """The record's own id, a text or a number, or the default. RecordError where it is something else."""
    value = record.get("id")
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, "id") or default


def unique(sample_id: str, seen: dict[str, int]) -> str:
    """`x`, or `x#2`, `x#3`, ... where it has been `seen`."""
    name = sample_id
    while name in seen:
        seen[sample_id] += 1
        name = f"{sample_id}#{seen[sample_id]}"
    seen[name] = 1
    return name


# ----------------------------------------------------------------------------------------------------------- fields


def check_text(value: object, field: str) -> str:
    """`value` if it is a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RecordError(field, f"{shown(value)} is of type {type(value).__name__}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(field, f"half a surrogate pair at character {error.start}; write the text as UTF-8") from None
    return value


# ------------------------------------------------------------------------------------------------------------ paths


def resolve_media(root: Path, value: object, field: str) -> Path:
    """The file that a record names, relative to `root`, with symbolic links followed. It may be missing.

    Where it is, its other spellings are tried: with `/` for `\\`, in NFC and NFD, with the suffix in the other case.

    Raises:
        RecordError: a URL, a drive of Windows, a path that leads out of `root`, or something else than a regular file.
    """
    path, mode = resolve_path(root, value, field)
    if mode and not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise RecordError(field, f"{shown(value)} is {what}; name a file")
    return path


def resolve_path(root: Path, value: object, field: str) -> tuple[Path, int]:
    """As `resolve_media`, for files and folders; with the mode of what is there, 0 where nothing is."""
    text = check_text(value, field)
    if not text or "\0" in text:
        raise RecordError(field, f"{shown(text)} is no path; name a file under data.root")
    on_drive = without_drive(text)
    if _URL.match(text) and on_drive is None:
        raise RecordError(field, f"{shown(text)}: URLs in records are off; download it, and name the file")
    real, mode, top = _look_up(root, text)
    if on_drive is not None and not mode:
        what = f"{shown(text)} is a path of Windows; there is no such drive here"
        raise RecordError(field, f"{what}: {_relative_mend(root, on_drive)}")
    if os.path.commonpath([top, real]) != top:
        way_out = f"{shown(text)} leads to {real!r}, out of data.root = {top!r}"
        raise RecordError(field, f"{way_out}; move the file there, or set data.root: {_relative_mend(root, text)}")
    return Path(real), mode


def _relative_mend(root: Path, path: str) -> str:
    """How to write a path from elsewhere: as the part of it that is found in `root`, if there is one."""
    parts = path.strip("/").split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    found = next((tail for tail in tails if tail and ".." not in parts and _look_up(root, tail)[1]), "")
    return f"write {shown(found)}" if found else "write it relative to data.root, with '/'"


@lru_cache(maxsize=65536)  # a video has several records, often one behind another, and a look at the disk is slow
def _look_up(root: Path, text: str) -> tuple[str, int, str]:
    """The real path of `text` under `root`, its mode (0: nothing there, or not to be seen), the real path of `root`."""
    top = os.path.realpath(root)
    for spelling in spellings(text):
        real = os.path.realpath(os.path.join(top, spelling))
        with suppress(OSError):
            return real, os.stat(real).st_mode, top
    return os.path.realpath(os.path.join(top, text)), 0, top


def spelt(root: Path, path: str) -> Path:
    """The file or folder of that name in `root`, in whichever of its spellings it is there; else as it is written."""
    return next((root / form for form in spellings(path) if os.path.exists(root / form)), root / path)


def is_there(root: Path, path: str) -> bool:
    """Whether `root` has a file or folder of that name, in any of its spellings; not where no name can be so long."""
    return any(os.path.exists(root / form) for form in spellings(path))


def files_below(folder: Path, suffix: str) -> list[tuple[Path, str]]:
    """The files with this ending at any depth, and their names from `folder` on, sorted; none that is a system's own.

    UserError where there are none.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == suffix)
    named = [(path, path.relative_to(folder).as_posix()) for path in files]
    chosen = [(path, name) for path, name in named if not is_stray(name)]
    if not chosen:
        raise UserError(f"{folder}: the folder has no {suffix} files; give a file, or the folder that holds them")
    return chosen


def resolve_frames(root: Path, value: object, field: str) -> tuple[Path, ...]:
    """The pictures in a folder under `root`, in the order of the numbers in their names.

    Raises:
        RecordError: as `resolve_media`; also where there are no pictures.
    """
    folder, _ = resolve_path(root, value, field)
    try:
        inside = os.listdir(folder)
    except OSError as error:
        raise RecordError(
            field, f"the folder {folder} can't be read ({error.strerror}); mend its permissions"
        ) from None
    pictures = (name for name in inside if os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES)
    names = [name for name in pictures if not is_stray(name)]
    if not names:
        raise RecordError(field, f"the folder {folder} has no pictures; name a folder of frames or a video")
    return tuple(resolve_media(root, str(folder / name), field) for name in natural_order(names))


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted by the numbers in them: `f2` before `f10`."""
    return sorted(
        names, key=lambda n: [(int(part), "") if part.isdecimal() else (0, part) for part in _DIGITS.split(n)]
    )
