"""Tar archives made for tests, by the standard library's writer."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_tar(path: Path, files: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options: Any) -> Path:
    """Regular files, in order; compressed where `path` says so. `options` are `tarfile.open`'s."""
    entries = []
    for name, content in files.items() if isinstance(files, Mapping) else files:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        entries.append((entry, content))
    return write_entries(path, entries, **options)


def write_entries(path: Path, entries: Iterable[tuple[tarfile.TarInfo, bytes]], **options: Any) -> Path:
    """Members of any type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w" if path.name.endswith(".tar") else "w:gz", **options) as tar:
        for entry, content in entries:
            tar.addfile(entry, io.BytesIO(content))
    return path


def plain(path: Path) -> bytes:
    """The bytes of the tar, uncompressed."""
    content = path.read_bytes()
    return content if path.name.endswith(".tar") else gzip.decompress(content)


def cut(path: Path, length: int) -> Path:
    """Cut the file off after `length` bytes (from its end where negative)."""
    path.write_bytes(path.read_bytes()[:length])
    return path
