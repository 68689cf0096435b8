"""Files of data sets on disk or on the hub (`hf://`), and the clips in tar archives.

Archives are read from start to end, and again from the place where reading stopped.

A place in an archive is the offset in bytes, in the tar, of a member's header. To go on there, nothing in front of it
is read. A compressed archive cannot be entered in the middle: there everything in front is decompressed and dropped.
"""

from __future__ import annotations

import gzip
import itertools
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vft.common.errors import UserError, first_line
from vft.common.types import MediaInfo, Sample
from vft.data.records.paths import is_stray
from vft.data.records.record import BadRecord

SUFFIXES = (".tar", ".tar.gz", ".tgz")
CHUNK_BYTES = 1 << 20
MAX_MEMBER_BYTES = 16 << 30
"""Hours of video at the quality of a disc."""
MAX_HEADER_BYTES = 1 << 20
"""Of a long name or other extended header of a member, which tarfile reads into memory."""
MAX_FILES = 100_000
"""Members of one clip: the frames of a video of an hour."""
MAX_RATIO, SUSPECT_BYTES = 200, 1 << 30
"""An archive is a bomb if it has unpacked to so many bytes, and to so many times its own size. gzip packs zeros 1,000
times smaller, text ten times, video not at all."""
OTHER_COMPRESSION = {
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"PK\x03\x04": "zip",
    rb"7z\xbc\xaf": "7-zip",
}
"""Kinds that are not read, by a file's first bytes."""
_NUMBERS = itertools.count()
_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}\Z")
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OverflowError, RecursionError)
_EXTENDED_HEADERS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


# ------------------------------------------------------------------------------------------------------ any files


def list_files(location: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files with these suffixes at `location`, a file or a folder of any depth, local or `hf://`, sorted by name.

    UserError if there are none, or if they cannot be listed.
    """
    try:
        file_system, root = _file_system(location)
        names = [root] if file_system.isfile(root) else file_system.find(root)
        names = [name for name in names if name.lower().endswith(suffixes)]
        names = [name for name in names if name == root or not is_stray(os.path.relpath(name, root))]
        urls = sorted(file_system.unstrip_protocol(name) for name in names)
    except Exception as error:  # the hub's client has a dozen classes, for being offline and for unknown names
        raise UserError(f"{location}: can't be listed ({first_line(error)}); check name and network") from error
    if not urls:
        raise UserError(f"{location}: no {' or '.join(suffixes)} files there; check data.root and the source's path")
    return [url.removeprefix("file://") for url in urls]


@contextmanager
def open_file(url: str) -> Iterator[Any]:
    """A file, local or `hf://`, to read from. UserError if it cannot be opened."""
    try:
        file_system, path = _file_system(url)
        opened = file_system.open(path, "rb")  # a remote file reads 5 MB ahead, which suits reading from start to end
    except Exception as error:
        raise UserError(f"{url}: can't be opened ({first_line(error)}); check the name and the network") from error
    with opened as file:
        yield file


def read_bytes(url: str) -> bytes:
    """The content of a file, local or `hf://`. UserError if it cannot be read."""
    with open_file(url) as file, _reading(url):
        return bytes(file.read())


def _file_system(location: str) -> tuple[Any, str]:
    """The fsspec file system that holds a location, and the path in it."""
    if location.startswith("hf://"):
        return url_to_fs(location)
    if os.path.exists(location) and not os.path.isfile(location) and not os.path.isdir(location):
        raise OSError("is no regular file")  # opening a FIFO would block
    return LocalFileSystem(), os.path.abspath(location)  # url_to_fs would split a name at "::"


# ------------------------------------------------------------------------------------------------------------- archives


class DamagedArchive(Exception):
    """An archive is cut off or is not one; what comes before the damage can be used. `str()` is one line."""


@dataclass(frozen=True)
class Member:
    """One regular file in an archive. `read` or `save` it before going on to the next.

    Both raise DamagedArchive if the archive breaks off within it.
    """

    archive: str
    name: str
    place: int
    file: IO[bytes]

    def read(self, size_bytes: int = -1) -> bytes:
        """The next bytes of the content; all of them without a size."""
        with _reading(self.archive):
            return self.file.read(size_bytes)

    def save(self, folder: Path) -> Path:
        """Copy the content to a file in `folder`, with a name that this process has not used before."""
        suffix = _SUFFIX.search(self.name.lower())
        path = folder / f"{next(_NUMBERS):08d}{suffix[0] if suffix else ''}"
        try:
            with path.open("wb") as target:
                shutil.copyfileobj(self, target, CHUNK_BYTES)
        except BaseException as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(f"{folder}: can't be written ({error.strerror}); free space there") from error
            raise
        return path


def members(archive: str, place: int = 0) -> Iterator[Member]:
    """The regular files of an archive in order, from `place` on. Links and devices are skipped.

    Raises:
        DamagedArchive: after everything that can be read.
        UserError: the archive cannot be opened, or its disk or network fails.
    """
    with open_file(archive) as opened:
        with _reading(archive):
            start = opened.read(10)  # tells the compression, whatever the archive is called
            opened.seek(0)
        if kind := next((kind for magic, kind in OTHER_COMPRESSION.items() if re.match(magic, start)), ""):
            raise DamagedArchive(f"{archive}: is packed by {kind}, which is not read; pack it as .tar or .tar.gz")
        is_plain = not start.startswith(b"\x1f\x8b")
        file = opened if is_plain else _Decompressed(opened)
        with _reading(archive):
            file.seek(place)
            # tarfile counts offsets from the start of the file, wherever it begins to read. They grow from header to
            # header (checked below), so nothing is read twice.
            tar = tarfile.TarFile(fileobj=file, tarinfo=_Header)
        while True:
            with _reading(archive):
                entry = tar.next()
                if entry is None:
                    while not is_plain and file.read(CHUNK_BYTES):
                        pass  # up to the checksum
                    return
                if entry.size < 0 or tar.offset <= entry.offset:
                    raise tarfile.ReadError("a member of negative size")
                if entry.isreg() and (entry.size > MAX_MEMBER_BYTES or entry.sparse is not None):
                    size = f"{entry.size / (1 << 30):.0f} GiB of at most {MAX_MEMBER_BYTES >> 30}"
                    raise tarfile.ReadError(f"the member {entry.name!r:.60} is sparse or too large, {size}")
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps the headers of the whole archive
                content = tar.extractfile(entry) if entry.isreg() else None
            if content is not None:
                yield Member(archive, entry.name.removeprefix("./"), entry.offset, content)


@contextmanager
def _reading(archive: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise DamagedArchive(f"{archive}: {first_line(error)}; download it again") from error
    except Exception as error:  # of the disk, the hub's client or its network library: they share no class
        raise UserError(f"{archive}: can't be read ({first_line(error)}); check the disk or network") from error


class _Decompressed(gzip.GzipFile):
    """The content of a compressed archive. tarfile.ReadError as soon as it turns out to be a bomb."""

    def __init__(self, packed: Any) -> None:
        super().__init__(fileobj=packed)
        self.packed = packed

    def read(self, size: int | None = -1) -> bytes:
        """As of any file."""
        content = super().read(size)
        if self.tell() > max(SUSPECT_BYTES, MAX_RATIO * self.packed.tell()):
            raise tarfile.ReadError(f"unpacks to more than {MAX_RATIO} times its size")
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Forward in chunks, each of which is checked."""
        while whence == os.SEEK_SET and self.tell() < offset and self.read(min(CHUNK_BYTES, offset - self.tell())):
            pass
        return super().seek(offset, whence)


class _Header(tarfile.TarInfo):
    """A member's header. One that is cut off or garbled is damage; tarfile takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """A header out of its block. tarfile.HeaderError if it announces an absurdly long extended header."""
        entry = super().frombuf(buf, encoding, errors)
        if entry.type in _EXTENDED_HEADERS and entry.size > MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"{entry.size} bytes of remarks on a member")
        return entry

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """The next header. EOFHeaderError at the block of zeros that ends an archive."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed leaves it out
            raise
        except (tarfile.HeaderError, ValueError, IndexError) as error:
            raise tarfile.ReadError(f"cut off or garbled ({first_line(error)})") from error


# --------------------------------------------------------------------------------------------------------------- clips


class EmptyArchive(Exception):
    """An archive is whole, but holds no clips. `str()` is one line."""


class Position(NamedTuple):
    """Where a slot's stream is: the next document is number `document` of the clip at `place`."""

    epoch: int = 0
    shard: int = 0
    """Number in the slot's order of archives."""
    place: int = 0
    """In the archive."""
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
