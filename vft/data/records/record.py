"""One record: the errors that name its fields, its id and texts, and the loop that turns records into samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from vft.common.task import CLOSE, OPEN
from vft.common.types import Sample, Turn
from vft.common.unique import unique_name

Row = TypeVar("Row")
Record = dict[str, Any]

TURN_KEYS = ("messages", "conversations")
"""Keys that may hold a record's turns."""
REASONING = ("reasoning_content", "reasoning")
"""Keys of a message for what the assistant thought before its answer."""
TOO_DEEP = "is nested too deeply; each record must be a JSON object of a few levels"


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used."""

    origin: str
    """Where it is, such as `train.json:12`."""
    field: str
    """The field that is wrong; empty for the record as a whole."""
    message: str
    """What is wrong, and how to fix it."""

    def __str__(self) -> str:
        return f"{self.origin}: {self.field}: {self.message}" if self.field else f"{self.origin}: {self.message}"


Records = tuple[list[Sample], list[BadRecord]]
"""The samples of a source, and the records that cannot be used."""


@dataclass(frozen=True, slots=True)
class ParsedRecord:
    """What a format makes of one record."""

    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()
    """Keys that the format does not read."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What the sample's fields hold instead of the record's values."""


class RecordError(Exception):
    """A field of a record is wrong. The reader turns it into a BadRecord."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        # A user's key may hold line breaks, or characters that cannot be encoded.
        self.field, self.message = field if field.isprintable() else ascii(field), message

    def at(self, origin: str) -> BadRecord:
        """The bad record, given where it is."""
        return BadRecord(origin, self.field, self.message)


def short_repr(value: object) -> str:
    """A value for a message: the start of it, on one line."""
    text = ascii(value) if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def list_keys(record: Mapping[str, Any]) -> str:
    """The keys of a record for a message."""
    return f"{', '.join(map(short_repr, record)):.300}" or "no fields"


# ---------------------------------------------------------------------------------------------------------- samples


def make_samples(rows: Iterable[tuple[str, Row]], parse: Callable[[Row, str], Iterable[Sample]]) -> Records:
    """Turn rows, each given with its origin, into samples, or into a BadRecord if `parse(row, origin)` raises
    RecordError. A sample whose id has occurred before gets a number: `x`, `x#2`, ..."""
    samples: list[Sample] = []
    bad: list[BadRecord] = []
    seen: dict[str, int] = {}
    for origin, row in rows:
        try:
            parsed = list(parse(row, origin))
        except RecordError as error:
            bad.append(error.at(origin))
        except RecursionError:
            bad.append(BadRecord(origin, "", TOO_DEEP))
        else:
            samples += [replace(sample, id=unique_name(sample.id, seen)) for sample in parsed]
    return samples, bad


# ----------------------------------------------------------------------------------------------------------- fields


def as_object(record: object) -> Record:
    """`record`, if it is a JSON object. RecordError if not: it may stand in the place of a line that is no record."""
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError("", f"{short_repr(record)} is no JSON object; each record must be one")
    return record


def record_id(record: Mapping[str, Any], default: str) -> str:
    """The record's `id`, a text or a number, or the default. RecordError if it is something else."""
    value = record.get("id")
    if value is None:
        return default
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, "id") or default


def read_history(value: Any) -> Iterator[Record]:
    """Earlier turns, pairs of a question and an answer."""
    if value is None or value == "":
        return
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RecordError("history", f"{short_repr(value)} must be a list of pairs, a question and its answer")
    for i, pair in enumerate(value):
        yield {"role": "user", "content": check_text(pair[0], f"history[{i}][0]")}
        yield {"role": "assistant", "content": check_text(pair[1], f"history[{i}][1]")}


def check_text(value: object, field: str) -> str:
    """`value`, if it is a text that can be written as UTF-8. RecordError if not."""
    if not isinstance(value, str):
        what = "null" if value is None else f"{short_repr(value)} is of type {type(value).__name__}"
        raise RecordError(field, f"{what}; it must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(field, f"half a surrogate pair at character {error.start}; write the text as UTF-8") from None
    return value


def read_reasoning(entry: Mapping[str, Any], role: str, content: object, name: str) -> str:
    """What the assistant thought before it answered, from the key in which servers (vLLM, DeepSeek's) give it."""
    keys = [key for key in REASONING if entry.get(key) not in (None, "")]
    if not keys:
        return ""
    field, thought = f"{name}.{keys[0]}", check_text(entry[keys[0]], f"{name}.{keys[0]}")
    if role != "assistant":
        raise RecordError(field, f"stands in the {role}'s turn; only an answer has reasoning")
    if OPEN in thought or CLOSE in thought or CLOSE in str(content):
        raise RecordError(field, f"stands beside {OPEN} in the text; keep one of the two")
    return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n"
