"""What a file or folder of records is: the format that reads its first records, and the folder of their media."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.data.records.files import at_most, read_records, record_files
from vft.data.records.paths import find_path

LOOKED_AT = 20
"""Records of a file from which its format is told."""
MAX_FOLDERS = 2000
"""Looked into for media."""
NATIVE = "messages"
"""The format that is tried first, and taken if no other reads more."""


def detect(path: str, data: DataConfig, media: str = "", columns: Mapping[str, str] | None = None) -> SourceConfig:
    """The source at `path`, relative to `data.root`, in the format that reads most of its first records and finds most
    of their media; `messages` if none reads any. Its media may lie in a folder of `data.root` that the records don't
    name, which is looked for, unless `media` names it. With `columns` only formats that have them are tried.
    """
    given: dict[str, Any] = {"path": path, "media": media, "columns": dict(columns or {})}
    found, most, first = SourceConfig(format=NATIVE, **given), (0.0, 0.0), list[Sample]()
    for name in (NATIVE, *(name for name in formats.names() if name != NATIVE)):
        try:
            source = SourceConfig(format=name, **given)
        except ValueError:  # it has no such setting, or can only be streamed
            continue
        samples, read = _first_samples(source, data)
        if (score := (_present(samples), read)) > most:
            found, most, first = source, score, samples
    if not most[0] and "media" in formats.find(found.format).settings and not media:
        return found.model_copy(update={"media": _media_folder(first, data.root)})
    return found


def keys_of(path: str, data: DataConfig) -> list[str]:
    """The keys of the first records at a source's path, or the columns of a table; none if it has no records."""
    try:
        file = record_files(find_path(data.root, path))[0][0]
        with at_most(LOOKED_AT):
            records = [record for _, record in read_records(file)]
    except UserError:
        return []
    return list(dict.fromkeys(key for record in records if isinstance(record, dict) for key in record))


def media_of(samples: list[Sample]) -> Iterator[MediaRef]:
    """All media that the samples show, in order."""
    return (part for one in samples for turn in one.turns for part in turn.parts if isinstance(part, MediaRef))


def _first_samples(source: SourceConfig, data: DataConfig) -> tuple[list[Sample], float]:
    """The first samples, and the share of the first records that are read; none if it isn't this format."""
    try:
        with at_most(LOOKED_AT):
            samples, bad = formats.read(source, data)
    except (UserError, NotImplementedError):
        return [], 0.0
    return samples[:LOOKED_AT], len(samples) / max(1, len(samples) + len(bad))


def _present(samples: list[Sample]) -> float:
    """The share of the samples that have media, all of which are there."""
    files = [[file for ref in media_of([one]) for file in ref.files] for one in samples]
    return sum(bool(own) and all(map(os.path.exists, own)) for own in files) / max(1, len(files))


def _media_folder(samples: list[Sample], root: Path) -> str:
    """The folder of `root` in which the first medium lies by the name that it has in the records; empty if none."""
    top = os.path.realpath(root)
    file = next((ref.files[0] for ref in media_of(samples) if ref.files), None)
    if file is None:
        return ""
    name = os.path.relpath(file, top)
    for number, (folder, folders, _) in enumerate(os.walk(top)):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        if os.path.exists(os.path.join(folder, name)):
            return os.path.relpath(folder, top) if folder != top else ""
        if number == MAX_FOLDERS:
            break
    return ""
