"""Formats of data sets: a module of this folder for each, called as in `format = "NAME"`, with one subclass of Format.

docs/develop/new_format.md adds one step by step. What formats share is in `vft/data/records/`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

from vft.common.errors import UserError, missing
from vft.common.plugins import load_class
from vft.common.types import Sample
from vft.config.data import OPTIONAL_SETTINGS, DataConfig, SourceConfig, source_checks
from vft.config.toml import show
from vft.data.records.files import read_samples, record_files
from vft.data.records.paths import find_path
from vft.data.records.record import BadRecord, ParsedRecord, Record, Records
from vft.data.streaming.archives import ArchiveClip

READ_AS_MESSAGES = frozenset(
    {"sharegpt", "llava", "openai", "alpaca", "llama_factory", "swift", "ms_swift", "json", "jsonl", "csv", "tsv"}
    | {"parquet", "arrow", "chatml", "conversations", "label_studio", "table"}
)
"""What others call records that the format `messages` reads."""


@dataclass(frozen=True)
class Archives:
    """The archives of a source with `stream = true`."""

    shards: Sequence[str]
    """Their paths or URLs."""
    clips: Callable[[str, int, Path, Callable[[int], bool]], Iterator[ArchiveClip]]
    """`clips(shard, place, spool, is_wanted)`: the clips of a shard from a place on, their files copied into the folder
    `spool`. A clip whose number is not wanted comes without files and records."""
    digest: str = ""
    """Of the records, if they are files beside the archives."""
    bad: Sequence[BadRecord] = ()
    """Records that no clip can have."""
    unread: Sequence[tuple[str, ...]] = ()
    """Keys that are not read, of each record that is known before the archives are read."""
    warning: str = ""
    """What looks wrong about the archives."""


class Format:
    """How the records of a data set become samples. A subclass gives `parse`, or reads in its own way with `read`."""

    settings: ClassVar[frozenset[str]] = frozenset()
    """Which of `OPTIONAL_SETTINGS` a source of this format may have."""
    columns: ClassVar[frozenset[str]] = frozenset()
    """With the setting `columns`: the keys that it may rename."""
    notes_inputs: ClassVar[bool] = False
    """Whether `read` depends on nothing but the records' `files`, the media, and what `vft.data.records` notes. Then
    its plan can be stored (`vft/data/stored.py`)."""

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """The samples of a source, and the records that cannot be used.

        Raises:
            UserError: a file as a whole cannot be read; names file and line.
        """
        files = self.files(find_path(data.root, source.path))
        return read_samples(files, lambda record, _: self.parse(record, source, data))

    def files(self, path: Path) -> list[tuple[Path, str]]:
        """The files at the source's path, each with its name for messages. UserError if there are none."""
        return record_files(path)

    def parse(self, record: Record, source: SourceConfig, data: DataConfig) -> ParsedRecord:
        """The turns of one record of a JSON, CSV or Parquet file. RecordError names the field that is wrong."""
        raise NotImplementedError(f"{type(self).__name__} has neither parse nor read")

    def open_archives(self, location: str) -> Archives:
        """The archives at a path or URL, for `stream = true`. UserError if there are none."""
        raise NotImplementedError(f"{type(self).__name__} has the setting stream and no open_archives")

    def check(self, source: SourceConfig) -> None:
        """ValueError if the settings of a source do not fit the format."""


def names() -> list[str]:
    """All formats of this package, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def find(name: str) -> Format:
    """The format called `name`: one of `names`, or `module:Class` from elsewhere. UserError if there is none."""
    if ":" in name:
        found = load_class(name)
        if not issubclass(found, Format):
            raise UserError(f"{found.__name__} is not a subclass of vft.data.formats.Format")
        return found()
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        meant = f"; {name} is read by 'messages'" if name.lower() in READ_AS_MESSAGES else meant
        listed = ", ".join(map(repr, names()))
        raise UserError(f"must be one of {listed}, or module:Class for a format of your own{meant}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Format) and one.__module__ == module.__name__
    )
    return found()


def check(source: SourceConfig) -> None:
    """ValueError if the other settings of a source do not fit its format."""
    format = find(source.format)
    for setting in OPTIONAL_SETTINGS:
        if getattr(source, setting) and setting not in format.settings:
            *takers, last = [name for name in names() if setting in find(name).settings]
            listed = f"{', '.join(takers)} and {last}" if takers else last
            raise ValueError(f"{setting} = {show(getattr(source, setting))} goes with {listed}; take it out")
    for name, column in source.columns.items():
        if name not in format.columns and column in format.columns:
            raise ValueError(f'columns.{name} = "{column}": our name comes first: {{ {column} = "{name}" }}')
        if name not in format.columns:
            known = ", ".join(sorted(format.columns))
            raise ValueError(f"columns.{name}: is not known to {source.format}; known are {known}")
    format.check(source)


source_checks |= {"format": find, "source": check}


def read(source: SourceConfig, data: DataConfig) -> Records:
    """The samples of a source, and its records that cannot be used; origins are relative to `data.root`, and media
    are looked for there alone.

    Raises:
        UserError: a file that cannot be read, or is not in the source's format; names file and line.
    """
    try:
        samples, bad = find(source.format).read(source, data)
    except UserError:
        if ":" not in source.format:
            check_path(source.path, data.root)  # that is the cause, whatever was missed first
        raise
    samples = [replace(sample, origin=_below_root(source.path, sample.origin)) for sample in samples]
    return samples, [replace(error, origin=_below_root(source.path, error.origin)) for error in bad]


def check_path(path: str, root: Path, fix: str = "check data.root and the source's path") -> None:
    """UserError if a source's `path` is not there."""
    place = find_path(root, path)
    if "*" in path or "://" in path or place.exists():
        return
    if not root.is_dir():
        raise UserError(
            f"data.root = {str(root)!r}: {missing(root, 'folder', 'put the data there, or name its folder')}"
        )
    given, below = Path(path).absolute(), root.absolute()
    if given.exists() and given.is_relative_to(below):  # data/train.jsonl below data
        raise UserError(f"{place}: no such file; paths are below data.root: write {str(given.relative_to(below))!r}")
    raise UserError(f"{place}: {missing(place, 'file', fix)}")


def _below_root(path: str, origin: str) -> str:
    """`train.json:12` of a source `a/train.json` as `a/train.json:12`: two folders may have a file of that name."""
    folder, _, name = path.rstrip("/").rpartition("/")
    has_name = origin.startswith(name) and origin[len(name) :][:1] in (":", "/")
    if has_name or "*" in name:  # the files that a pattern matches are in its folder
        return f"{folder}/{origin}" if folder else origin
    return f"{path.rstrip('/')}/{origin}"


def locate(path: str, root: Path) -> str:
    """A path below `root`, or a URL as it is."""
    return path if path.startswith("hf://") else str(find_path(root, path))
