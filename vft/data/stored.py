"""Plans of large data sets, stored: a run that starts or resumes reads no records and tokenizes nothing.

The first process of a host to need a plan reads the sources, plans in worker processes and writes a folder of Arrow
files below the cache folder; all processes map these. Texts are read when a document is built.

The folder's name is a digest of all that is known without reading: the files of records with their sizes and times, the
settings, the task, the tokenizer with its template, the processor, our own code. What reading then depends on is in the
folder and is looked at again by every start: size and time of each medium, and what the readers of records noted. So
nothing of an old plan is used if anything is not as it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from functools import cache, cached_property
from importlib.metadata import version
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa

from vft.common.errors import UserError
from vft.common.files import cannot_write, digest, locked, whole_folder
from vft.common.task import Task
from vft.common.types import Conversation, MediaOptions, MediaRef, Turn, VisionLimits
from vft.config.data import DataConfig, SourceConfig, source_names
from vft.data import formats
from vft.data.chat import ChatEncoder
from vft.data.dataset import Dataset, MakeConversations, PlannedDocument, Prompts, Work, load_dataset
from vft.data.media.index import SCHEMA, StoredIndex
from vft.data.media.timed_text import FrameTimes, Subtitles
from vft.data.quarantine import BadItem
from vft.data.records.inputs import noting, state_of
from vft.data.records.paths import find_path, look_up
from vft.data.records.unread_keys import log_once
from vft.data.split import Split
from vft.distributed.process_group import environment

logger = logging.getLogger(__name__)

MIN_BYTES = 4 << 20
"""Records of fewer bytes are planned by every process at every start: that takes seconds."""
KEPT = 8
"""Plans in the cache folder. A further one replaces the one that was used longest ago."""
ROWS = 8192
"""Rows that are written at a time."""
INDIFFERENT = {"sources", "workers", "cache_dir", "cache", "cache_gib", "prefetch_packs"}
"""Settings of `[data]` that change no plan; the sources are named apart."""
CODE = ("common", "config", "data", "models", "recipes")
"""Folders of our code that plans depend on."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")


def load_stored(
    config: DataConfig,
    wanted: Sequence[SourceConfig],
    make_conversations: MakeConversations,
    task: Task,
    about: str,
    encoder: ChatEncoder,
    seed: int,
    split: Split | None = None,
) -> Dataset:
    """As `load_dataset`, from the stored plan if there is one that fits; otherwise the plan is stored, if it is large.

    `about` says which conversations of the `task` are made. Formats and tasks that are not ours are planned anew by
    every process, because nobody knows what they depend on.
    """
    key = _key(config, wanted, task, about, encoder, seed, split)
    if key is None:
        return load_dataset(config, wanted, make_conversations, encoder, seed, split)
    folder = config.cache_path / "plans" / key
    if (stored := _open(folder, encoder, config)) is not None:
        return stored
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(folder.parent, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        logger.warning("%s; every process plans the data", cannot_write(folder.parent, error))
        return load_dataset(config, wanted, make_conversations, encoder, seed, split)
    with locked(folder.with_suffix(".lock"), "another process that plans the data"):
        if (stored := _open(folder, encoder, config)) is not None:
            return stored
        look_up.cache_clear()  # what is known from before would not be noted
        with noting() as noted:
            dataset = load_dataset(config, wanted, make_conversations, encoder, seed, split, config.workers)
        try:
            _write(folder, dataset, noted)
        except (UserError, TypeError, ValueError, pa.ArrowException) as error:  # a full disk, an odd name
            logger.warning("the plan of the data can't be stored, and is made again at the next start: %s", error)
            return dataset
    return _open(folder, encoder, config, tell=False) or dataset


# ------------------------------------------------------------------------------------------- what a plan depends on


def _key(
    config: DataConfig,
    wanted: Sequence[SourceConfig],
    task: Task,
    about: str,
    encoder: ChatEncoder,
    seed: int,
    split: Split | None,
) -> str | None:
    """Differs for another plan; None for one that is not stored."""
    known = [formats.find(source.format) for source in wanted]
    ours = all(one.notes_inputs and type(one).__module__.startswith("vft.") for one in known)
    if not ours or not type(task).__module__.startswith("vft."):
        return None
    paths = [
        path
        for one, source in zip(known, wanted, strict=True)
        for path, _ in one.files(find_path(config.root, source.path))
    ]
    try:
        status = [path.stat() for path in paths]
    except OSError:  # reading says what is wrong
        return None
    if sum(one.st_size for one in status) < MIN_BYTES:
        return None
    places = [os.path.abspath(config.root), *map(os.path.realpath, [config.root, *paths])]
    records = places, [(str(path), one.st_size, one.st_mtime_ns) for path, one in zip(paths, status, strict=True)]
    called = source_names([*config.sources, *wanted])  # conversations carry the names, which depend on all sources
    settings = config.model_dump(exclude=INDIFFERENT), [(one.model_dump(), called[one.path]) for one in wanted]
    code = code_digest(), [version(library) for library in LIBRARIES]
    asked = type(task).__qualname__, repr(task), about, seed, split
    return digest(repr((records, settings, code, asked, encoder.fingerprint)))


@cache
def code_digest(folders: Sequence[str] = CODE) -> str:
    """A digest of the code that plans depend on, or of other folders: nobody has to remember to raise a version."""
    content, package = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(file for folder in folders for file in (package / folder).rglob("*.py")):
        content.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    return content.hexdigest()


# ---------------------------------------------------------------------------------------------------- on the disk

SCHEMAS = {
    "media": SCHEMA,
    "documents": pa.schema(
        {"work": pa.list_(pa.int64()), "samples": pa.int32(), "weight": pa.float64(), "limits": pa.string()}
    ),
    "conversations": pa.schema({"content": pa.string()}),
    "prompts": pa.schema(
        {**dict.fromkeys(("before", "behind", "system"), pa.string()), "options": pa.list_(pa.string())}
        | {"count": pa.int64()}
    ),
    "names": pa.schema({"name": pa.string(), "samples": pa.int64()}),
}
"""The files of a plan. Conversations are in the order of their documents; `names` are those of media."""
ABOUT = "about.json"


def _write(folder: Path, dataset: Dataset, noted: Mapping[str, str]) -> None:
    """Store a plan, and remove those that were not used for long. Nothing of it is there before all of it is.

    Raises UserError if the disk is full, TypeError or ValueError for something that cannot be stored.
    """
    assert dataset.index is not None
    documents = dataset.documents
    rows: dict[str, Iterable[Mapping[str, Any]]] = {
        "documents": (
            {
                "work": one.work,
                "samples": len(one.conversations),
                "weight": one.weight,
                "limits": _text(one.media_limits),
            }
            for one in documents
        ),
        "conversations": ({"content": _text(one)} for document in documents for one in document.conversations),
        "prompts": (
            {"before": before, "behind": behind, "system": system, "options": options, "count": count}
            for (before, behind, system, options), count in dataset.prompts.items()
        ),
        "names": ({"name": name, "samples": count} for name, count in dataset.samples_by_medium.items()),
    }
    with whole_folder(folder) as partial:
        _write_table(partial / "media", [dataset.index.table])
        for name, own in rows.items():
            _write_table(partial / name, (pa.Table.from_pylist(some, SCHEMAS[name]) for some in _batched(own)))
        about = {
            "files": {name: _checksum(partial / name) for name in SCHEMAS},
            "digest": dataset.digest,
            "num_shortened": dataset.num_shortened,
            "num_paired": dataset.num_paired,
            "notes": dataset.notes,
            "bad": [pack(item) for item in dataset.bad],
            "noted": dict(noted),
        }
        text = json.dumps(about)
        (partial / ABOUT).write_text(f"{zlib.crc32(text.encode()):08x}\n{text}", encoding="utf-8")
    with suppress(OSError):  # another process may remove them too
        for old in sorted(folder.parent.glob("*/"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old)


def _write_table(path: Path, tables: Iterable[pa.Table]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMAS[path.name]) as writer:
        for table in tables:
            writer.write_table(table)


def _batched(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, ROWS)):
        yield batch


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _open(folder: Path, encoder: ChatEncoder, config: DataConfig, tell: bool = True) -> StoredDataset | None:
    """The plan in a folder; None if there is none, if it is damaged, or if what it depends on has changed. With `tell`,
    show the notes of its making."""
    try:
        checksum, _, text = (folder / ABOUT).read_text(encoding="utf-8").partition("\n")
        about = json.loads(text) if checksum == f"{zlib.crc32(text.encode()):08x}" else {}
        if not about or any(_checksum(folder / name) != known for name, known in about["files"].items()):
            logger.warning("%s: damaged; the data are planned again", folder)
            return None
        tables = {name: pa.ipc.open_file(pa.memory_map(str(folder / name))).read_all() for name in SCHEMAS}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, pa.ArrowException) as error:
        logger.warning("%s: can't be read (%s); the data are planned again", folder, error)
        return None
    index = StoredIndex(tables["media"])
    if not index.is_current() or any(state_of(path) != state for path, state in about["noted"].items()):
        logger.info("media have changed since they were planned: the data are planned again")
        return None
    with suppress(OSError):
        os.utime(folder)
    if tell and environment().is_main:
        for note in about["notes"]:
            log_once(note)
    return StoredDataset(encoder, config, index, tables, about)


class StoredDataset(Dataset):
    """A planned data set whose texts stay on the disk."""

    def __init__(
        self, encoder: ChatEncoder, config: DataConfig, index: StoredIndex, tables: dict[str, pa.Table], about: Any
    ) -> None:
        super().__init__(encoder, config, index.info)
        self._tables, self.index = tables, index
        documents = tables["documents"]
        self.samples = tuple(documents.column("samples").to_pylist())
        self.weights = tuple(documents.column("weight").to_pylist())
        self.documents = _Documents(documents, tables["conversations"], self.samples)
        self.digest = about["digest"]
        self.num_shortened, self.notes = about["num_shortened"], about["notes"]
        self.num_paired = about["num_paired"]
        self.bad = [unpack(item) for item in about["bad"]]

    @property
    def work(self) -> list[Work]:
        """What each document costs."""
        return [_work(values) for values in self._tables["documents"].column("work").to_pylist()]

    @property
    def distinct(self) -> Iterator[Conversation]:
        """As `Dataset.distinct`, without reading the others."""
        assert isinstance(self.documents, _Documents)
        for number in range(len(self.documents)):
            (first,) = self.documents.conversations(number, 1)
            yield from (first,) if first.media else self.documents.conversations(number)

    @property
    def prompts(self) -> Prompts:
        """What the conversations ask."""
        rows = self._tables["prompts"].to_pylist()
        return Prompts(
            {(one["before"], one["behind"], one["system"], tuple(one["options"])): one["count"] for one in rows}
        )

    @cached_property
    def samples_by_medium(self) -> Counter[str]:
        """How many samples show the medium of each name."""
        names, samples = (column.to_pylist() for column in self._tables["names"].columns)
        return Counter(dict(zip(names, samples, strict=True)))


class _Documents(Sequence[PlannedDocument]):
    """Documents that are read when they are asked for."""

    def __init__(self, documents: pa.Table, conversations: pa.Table, samples: Sequence[int]) -> None:
        self._documents, self._conversations, self._samples = documents, conversations, samples
        self._starts = tuple(accumulate(samples, initial=0))

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, number: int) -> PlannedDocument: ...
    @overload
    def __getitem__(self, number: slice) -> list[PlannedDocument]: ...
    def __getitem__(self, number: int | slice) -> PlannedDocument | list[PlannedDocument]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        number = range(len(self))[number]
        (row,) = self._documents.slice(number, 1).to_pylist()
        limits = unpack(json.loads(row["limits"]))
        return PlannedDocument(self.conversations(number), _work(row["work"]), row["weight"], limits)

    def conversations(self, number: int, limit: int | None = None) -> tuple[Conversation, ...]:
        """The conversations of a document, or the first ones."""
        own = self._conversations.slice(self._starts[number], limit or self._samples[number])
        return tuple(unpack(json.loads(text)) for text in own.column("content").to_pylist())


def _work(values: Sequence[int]) -> Work:
    return Work(*values)


# ------------------------------------------------------------------------------------------------ values as JSON

TYPES: dict[str, Any] = {
    one.__name__: one
    for one in (BadItem, Conversation, FrameTimes, MediaOptions, MediaRef, Subtitles, Turn, VisionLimits)
}
"""What is stored besides plain values: these classes alone are made of what a file says."""
PLAIN = (str, int, float, bool, type(None))


def _text(value: object) -> str:
    return json.dumps(pack(value), separators=(",", ":"))


def pack(value: Any) -> Any:
    """A value as JSON that `unpack` turns into an equal one: an array is a tuple, an object with one key is of the
    class that the key names. TypeError for another class."""
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is tuple:
        return [pack(one) for one in value]
    if kind is list:
        return {"list": [pack(one) for one in value]}
    if kind is dict:
        return {"dict": [[pack(key), pack(one)] for key, one in value.items()]}
    if isinstance(value, Path):
        return {"Path": str(value)}
    if TYPES.get(kind.__name__) is not kind:
        raise TypeError(f"{kind.__name__} in a conversation can't be stored")
    names, defaults = _fields_of(kind)
    values = [getattr(value, name) for name in names]
    while values and values[-1] == defaults[len(values) - 1]:
        values.pop()
    return {kind.__name__: [pack(one) for one in values]}


def unpack(value: Any) -> Any:
    """The value that `pack` was given."""
    if type(value) is list:
        return tuple([unpack(one) for one in value])
    if type(value) is not dict:
        return value
    ((name, content),) = value.items()
    if name == "Path":
        return Path(content)
    if name == "list":
        return [unpack(one) for one in content]
    if name == "dict":
        return {unpack(key): unpack(one) for key, one in content}
    return TYPES[name](*[unpack(one) for one in content])


@cache
def _fields_of(kind: type) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """Names and defaults of a dataclass's fields; MISSING, which equals nothing, for those that have none."""

    def default(field: Field[Any]) -> object:
        return field.default if field.default_factory is MISSING else field.default_factory()

    return tuple(field.name for field in fields(kind)), tuple(default(field) for field in fields(kind))
