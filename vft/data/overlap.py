"""Finds held-out samples that are also trained on: the same file under any name, or a copy of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from vft.common.types import Conversation

BLOCK_BYTES = 1 << 18
"""Bytes compared at a file's start, middle and end. A file of at most three such blocks is compared in full."""
THREADS = 32
MAX_NAMED = 10
"""Samples that a message names."""

Inode = tuple[int, int]


class Files:
    """Status and content of files. Each file is looked up once, and read only if another one has its size."""

    def __init__(self) -> None:
        self._status: dict[Path, os.stat_result | None] = {}
        self._digests: dict[Inode, bytes | None] = {}

    def look_up(self, paths: Iterable[Path]) -> None:
        """Look up many files in parallel."""
        new = [path for path in dict.fromkeys(paths) if path not in self._status]
        with ThreadPoolExecutor(THREADS) as threads:
            self._status.update(zip(new, threads.map(_status, new), strict=True))

    def inode(self, path: Path) -> Inode | None:
        """Equal for all links to one file; None if there is no file."""
        status = self._status[path]
        return None if status is None else (status.st_dev, status.st_ino)

    def size(self, path: Path) -> int | None:
        """Bytes; None if there is no file or it is empty."""
        status = self._status[path]
        return status.st_size or None if status is not None else None

    def digest(self, path: Path) -> bytes | None:
        """Digest of the size and the blocks at the start, middle and end; None if the file cannot be read."""
        inode, size = self.inode(path), self.size(path)
        if inode is None or size is None:
            return None
        if inode not in self._digests:
            self._digests[inode] = _digest(path, size)
        return self._digests[inode]


def _status(path: Path) -> os.stat_result | None:
    with suppress(OSError, ValueError):
        return path.stat()
    return None


def _digest(path: Path, size: int) -> bytes | None:
    content = hashlib.sha256(str(size).encode())
    starts = (
        (0, size // 2 - BLOCK_BYTES // 2, size - BLOCK_BYTES) if size > 3 * BLOCK_BYTES else range(0, size, BLOCK_BYTES)
    )
    with suppress(OSError), path.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            content.update(stream.read(BLOCK_BYTES))
        return content.digest()
    return None


def also_trained_on(held_out: Sequence[Conversation], training: Sequence[Conversation]) -> list[Conversation]:
    """The held-out conversations with a medium that is in training too, as the same file or a copy of it, whatever part
    of it is shown. One without media is in training if its text is, word for word."""
    files = Files()
    trained = {ref.files for one in training for ref in one.media}
    evaluated = {ref.files for one in held_out for ref in one.media}
    files.look_up(path for paths in (*trained, *evaluated) for path in paths)
    sizes = {tuple(map(files.size, paths)) for paths in evaluated}
    inodes = {tuple(map(files.inode, paths)) for paths in trained}
    # Only files whose size a held-out file has too can be copies of one.
    copies = {tuple(map(files.digest, paths)) for paths in trained if tuple(map(files.size, paths)) in sizes}
    texts = {_text(one) for one in training if not one.media}

    def is_trained(paths: tuple[Path, ...]) -> bool:
        inode = tuple(map(files.inode, paths))
        if paths in trained or (None not in inode and inode in inodes):
            return True
        content = tuple(map(files.digest, paths)) if copies else (None,)
        return None not in content and content in copies

    shared = {paths for paths in evaluated if is_trained(paths)}
    return [
        one for one in held_out if (any(ref.files in shared for ref in one.media) if one.media else _text(one) in texts)
    ]


def overlap_warning(held_out: Sequence[Conversation], training: Sequence[Conversation]) -> str:
    """A line that names the held-out samples that are also trained on; empty if there are none."""
    samples = also_trained_on(held_out, training)
    if not samples:
        return ""
    named = ", ".join(
        f"{one.id} ({', '.join(dict.fromkeys(Path(ref.name).name for ref in one.media)) or 'a text'})"
        for one in samples[:MAX_NAMED]
    )
    more = f" and {len(samples) - MAX_NAMED} more" if len(samples) > MAX_NAMED else ""
    return (
        f"{len(samples)} of {len(held_out)} held-out samples are also in training, as the same file or a copy "
        f"of it: {named}{more}; scores on them show what was memorised"
    )


def _text(one: Conversation) -> tuple[tuple[str, str], ...]:
    return tuple((turn.role, turn.text.strip()) for turn in one.turns)
