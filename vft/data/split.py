"""Held-out records apart from those to train on: the split by a hash of the medium (`eval.split`), and a search for
held-out samples that are trained on all the same, as the same file under any name or as a copy of it.

A record is held out if the hash of (seed, its first medium) is below the split's share. So neither new records nor
another order move a record to the other side. All records of one medium are on one side: a training record that also
shows the medium of a held-out one is left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vft.common.types import Conversation, MediaRef, Sample

BLOCK_BYTES = 1 << 18
"""Bytes compared at a file's start, middle and end. A file of at most three such blocks is compared in full."""
THREADS = 32
MAX_NAMED = 10
"""Samples that a message names."""
NO_FILE = (0, 0, 0)

_LAST_NUMBER = re.compile(r"[0-9]*(\.[^./]*)?$")


@dataclass(frozen=True)
class Split:
    """One side of a split."""

    share: float
    """Fraction of the media that are held out, between 0 and 1."""
    seed: int
    held_out: bool
    """The held-out side; otherwise the one to train on."""

    def select(self, samples: Sequence[Sample], root: Path) -> tuple[list[bool], int]:
        """For each sample, which may be of several sources, whether it is on this side; and how many are on neither."""
        top = os.path.realpath(root)
        names = [media_of(sample, top) for sample in samples]
        held = [self.is_held_out(own[0]) for own in names]
        if self.held_out:
            return held, 0
        unseen = {name for own, is_held in zip(names, held, strict=True) if is_held for name in own}
        trained = [not is_held and unseen.isdisjoint(own) for own, is_held in zip(names, held, strict=True)]
        return trained, len(samples) - sum(held) - sum(trained)

    def is_held_out(self, name: str) -> bool:
        """Whether a medium of this name is held out."""
        text = f"split:{self.seed}:{unicodedata.normalize('NFC', name)}"
        content = hashlib.sha256(text.encode(errors="surrogateescape"))
        return int.from_bytes(content.digest()[:8], "big") / 2**64 < self.share  # the hash as a fraction


def media_of(sample: Sample, top: str) -> list[str]:
    """Names of a sample's media relative to the real path of `data.root`, or its texts if it has no media.

    A file in an archive has its name there. A video stored as pictures has the start of the pictures' paths, without
    their numbers.
    """
    names = []
    for ref in (part for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef)):
        if ref.member:
            names.append(ref.member.partition("/")[2])
        elif isinstance(ref.path, tuple):
            names.append(_LAST_NUMBER.sub("", os.path.relpath(ref.path[0], top)))
        else:
            names.append(os.path.relpath(ref.path, top))
    return names or ["\n".join(turn.text for turn in sample.turns)]


# --------------------------------------------------------------------------------------------------------- overlap


def also_trained_on(held_out: Sequence[Conversation], training: Iterable[Conversation]) -> list[Conversation]:
    """The held-out conversations with a medium that is in training too, as the same file or a copy of it, whatever part
    of it is shown. One without media is in training if its text is, word for word."""
    trained: set[tuple[Path, ...]] = set()
    texts = set()
    for one in training:
        trained.update(ref.files for ref in one.media)
        if not one.media:
            texts.add(_text(one))
    evaluated = {ref.files for one in held_out for ref in one.media}
    files = list({path for paths in trained | evaluated for path in paths})
    with ThreadPoolExecutor(THREADS) as threads:
        status = dict(zip(files, threads.map(_status, files), strict=True))

    def sizes(paths: tuple[Path, ...]) -> tuple[int, ...]:
        return tuple(status[path][2] for path in paths)

    digest = cache(lambda path: _digest(path, status[path][2]))
    links = {tuple(status[path] for path in paths) for paths in trained}
    # Only files whose size a held-out file has too can be copies of one.
    wanted = set(map(sizes, evaluated))
    copies = {tuple(map(digest, paths)) for paths in trained if sizes(paths) in wanted}

    def is_trained(paths: tuple[Path, ...]) -> bool:
        own = tuple(status[path] for path in paths)
        if paths in trained or (NO_FILE not in own and own in links):
            return True
        content = tuple(map(digest, paths)) if copies else (None,)
        return None not in content and content in copies

    shared = {paths for paths in evaluated if is_trained(paths)}
    return [
        one for one in held_out if (any(ref.files in shared for ref in one.media) if one.media else _text(one) in texts)
    ]


def _status(path: Path) -> tuple[int, int, int]:
    """Device and inode, equal for all links to one file, and bytes; NO_FILE if there is none."""
    with suppress(OSError, ValueError):
        status = path.stat()
        return status.st_dev, status.st_ino, status.st_size
    return NO_FILE


def _digest(path: Path, size: int) -> bytes | None:
    """Digest of the size and the blocks at the start, middle and end; None if the file is empty or cannot be read."""
    content = hashlib.sha256(str(size).encode())
    starts = (
        (0, size // 2 - BLOCK_BYTES // 2, size - BLOCK_BYTES) if size > 3 * BLOCK_BYTES else range(0, size, BLOCK_BYTES)
    )
    with suppress(OSError), path.open("rb") as stream:
        for start in starts:
            stream.seek(start)
            content.update(stream.read(BLOCK_BYTES))
        return content.digest() if size else None
    return None


def overlap_warning(held_out: Sequence[Conversation], training: Iterable[Conversation]) -> str:
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
