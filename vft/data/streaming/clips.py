"""Clips on their way from an archive to the worker that decodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vft.common.types import MediaInfo, Sample
from vft.data.file_names import is_stray
from vft.data.records.record import BadRecord
from vft.data.streaming.tar import DamagedArchive, members

MAX_FILES = 100_000
"""Members of one clip: the frames of a video of an hour."""


class EmptyArchive(Exception):
    """An archive is whole, but holds no clips. `str()` is one line."""


class Position(NamedTuple):
    """Where a slot's stream is: the next document is number `document` of the clip at `place`."""

    epoch: int = 0
    shard: int = 0
    """Number in the slot's order of archives."""
    place: int = 0
    """In the archive, as `vft.data.streaming.tar` counts."""
    clip: int = 0
    """How many clips of the archive come before."""
    document: int = 0


START = Position()


@dataclass(eq=False)
class ArchiveClip:
    """One clip of an archive: members in sequence that belong together, copied to files for as long as it is needed.

    `copy_clips` makes it, a format adds the records about it, and the reader its position and the scans of its media.
    """

    archive: str
    key: str
    """What the names of its members have in common."""
    place: int
    """Of its first member in the archive."""
    is_skipped: bool = False
    """Another slot reads it: it has no files."""
    files: dict[str, Path] = field(default_factory=dict)
    """The copy of each member, by the member's name."""
    is_cut_off: bool = False
    """The archive is damaged within the clip or directly behind it."""
    samples: list[Sample] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    """Its records that cannot be used."""
    position: Position = START
    """Where the slot that reads it begins with it."""
    scans: dict[Path, Future[MediaInfo]] = field(default_factory=dict)
    num_documents: int = 0
    """Documents that still have to be decoded from the files."""

    def title(self, name: str) -> str:
        """`shard.tar/name`, for records and messages."""
        return f"{self.archive.rpartition('/')[2]}/{name}"

    def release(self) -> None:
        """One document is decoded, or will not be; after the last one the files are removed."""
        self.num_documents -= 1
        if self.num_documents <= 0:
            self.remove()

    def remove(self) -> None:
        """Remove the files."""
        for path in self.files.values():
            path.unlink(missing_ok=True)


def copy_clips(
    archive: str,
    place: int,
    spool: Path,
    key_of: Callable[[str], str | None],
    is_wanted: Callable[[int], bool] = lambda number: True,
    expected: str = "what is looked for",
) -> Iterator[ArchiveClip]:
    """The clips of an archive from `place` on, copied into the folder `spool`.

    Args:
        key_of: Gives the key of a member's name; None if it belongs to no clip. Members in sequence with the same key
            are one clip.
        is_wanted: Whether to copy the clip of this number. Called for every member: if it raises, reading ends at once.
        expected: What a member of a clip is, for messages.

    Raises:
        DamagedArchive: after the last clip that can be read.
        EmptyArchive: at the end of an archive in which no member has a key.
    """
    clip: ArchiveClip | None = None
    number = num_others = 0
    first_other = ""
    try:
        for member in members(archive, place):
            wanted, key = is_wanted(number), key_of(member.name)
            if key is None:
                if not is_stray(member.name):
                    num_others, first_other = num_others + 1, first_other or member.name
                continue
            if clip is not None and clip.key != key:
                yield clip
                clip, number = None, number + 1
                wanted = is_wanted(number)
            clip = clip or ArchiveClip(archive, key, member.place, is_skipped=not wanted)
            if clip.is_skipped:
                continue
            if len(clip.files) >= MAX_FILES:
                raise DamagedArchive(f"{archive}: more than {MAX_FILES} members of {key!r:.60}; download it again")
            path = member.save(spool)
            if member.name in clip.files:
                clip.files[member.name].unlink()
            clip.files[member.name] = path
    except DamagedArchive:
        if clip is not None:
            clip.is_cut_off = True
            yield clip
        raise
    if clip is not None:
        yield clip
    elif not place:
        files = f"none of its {num_others} files is {expected}; the first is {first_other!r:.200}"
        raise EmptyArchive(f"{archive}: {files if num_others else 'holds no files'}")
