"""What reading records looked at besides the files of records and the media: what a stored plan depends on.

A path that a record names may be looked for in several places, and the answer may change: a file appears where there
was none, a link is turned. Readers `note` what they asked; `vft/data/stored.py` asks again at the next start.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_noted: dict[str, str] | None = None


@contextmanager
def noting() -> Iterator[dict[str, str]]:
    """Collects the paths that are noted meanwhile, by this process alone, each with its state."""
    global _noted
    _first_missing.cache_clear()
    _noted = noted = dict[str, str]()
    try:
        yield noted
    finally:
        _noted = None


def note(path: str | os.PathLike[str]) -> None:
    """Something depends on what is at `path`: nothing, a file, the entries of a folder, or where a link leads."""
    if _noted is not None:
        name = os.fspath(path)
        name = _first_missing(os.path.dirname(name)) or name  # one folder for all that would be in it
        if name not in _noted:
            _noted[name] = state_of(name)


@lru_cache(maxsize=65536)
def _first_missing(folder: str) -> str:
    """The uppermost folder on the way to `folder` that is not there; empty if all are."""
    above = os.path.dirname(folder)
    if above == folder or os.path.lexists(folder):
        return ""
    return _first_missing(above) or folder


def state_of(path: str) -> str:
    """Differs if what is at `path` has changed."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a zero byte
        return ""
    kind = "folder" if stat.S_ISDIR(status.st_mode) else f"{stat.S_IFMT(status.st_mode):o}:{status.st_size}"
    return f"{os.path.realpath(path)}:{kind}:{status.st_mtime_ns}"
