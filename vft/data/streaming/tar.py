"""Tar archives, on disk or on the hub, read from front to back, and picked up again where one stopped.

A place in an archive is the byte of the tar where a member's header begins. To go on there, nothing before it is read;
of a compressed archive, which can't be entered in the middle, all before it is unpacked and thrown away.
"""

from __future__ import annotations

import gzip
import itertools
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vft.common.errors import UserError, first_line
from vft.data.file_names import is_stray

SUFFIXES = (".tar", ".tar.gz", ".tgz")
CHUNK_BYTES = 1 << 20
MAX_MEMBER_BYTES = 16 << 30
"""Hours of video at the quality of a disc."""
MAX_HEADER_BYTES = 1 << 20
"""Of a long name or other remarks on a member, which tarfile reads whole."""
MAX_FILES = 100_000
"""Members that belong together: the frames of one video, an hour of them."""
MAX_RATIO, SUSPECT_BYTES = 200, 1 << 30
"""An archive that has unpacked to so many bytes, and to so many times its own, is a bomb: gzip packs zeros 1,000-fold,
text tenfold, video not at all."""
OTHER_KINDS = {
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"PK\x03\x04": "zip",
    rb"7z\xbc\xaf": "7-zip",
}
"""What packs otherwise, by a file's first bytes."""
_NUMBERS = itertools.count()
_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}\Z")
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OverflowError, RecursionError)
_REMARKS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


class DamagedArchive(Exception):
    """An archive is cut off or isn't one; what comes before the damage can be used. `str()` is one line."""


class BarrenArchive(Exception):
    """An archive is whole and holds nothing of what is looked for. `str()` is one line."""


@dataclass(frozen=True)
class Member:
    """One regular file in an archive; `read` or `save` it before going on to the next.

    Both raise DamagedArchive where the archive breaks off within it.
    """

    archive: str
    name: str
    place: int
    file: IO[bytes]

    def read(self, size_bytes: int = -1) -> bytes:
        """The next bytes of the content; without a size all of them."""
        with _reading(self.archive):
            return self.file.read(size_bytes)

    def save(self, folder: Path) -> Path:
        """Copy the content to a file in `folder`, under a name that this process has not used before."""
        suffix = _SUFFIX.search(self.name.lower())
        path = folder / f"{next(_NUMBERS):08d}{suffix[0] if suffix else ''}"
        try:
            with path.open("wb") as target:
                while chunk := self.read(CHUNK_BYTES):
                    target.write(chunk)
        except BaseException as error:
            with suppress(OSError):
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise UserError(f"{folder}: can't be written ({error.strerror}); free space there") from error
            raise
        return path


@dataclass
class Run:
    """Members one behind another that belong together, copied out."""

    archive: str
    key: str
    place: int
    """Of the first."""
    files: dict[str, Path] = field(default_factory=dict)
    """The copy of each member, by its name."""
    passed_over: bool = False
    """Nobody wanted it: it has no copies."""
    cut_off: bool = False
    """The archive breaks off within or right behind it."""

    def title(self, name: str) -> str:
        """`shard.tar/name`, for records and messages."""
        return f"{self.archive.rpartition('/')[2]}/{name}"

    def remove(self) -> None:
        """Remove the copies."""
        for path in self.files.values():
            path.unlink(missing_ok=True)


def copied(
    archive: str,
    place: int,
    spool: Path,
    key_of: Callable[[str], str | None],
    wanted: Callable[[int], bool] = lambda number: True,
    expected: str = "what is looked for",
) -> Iterator[Run]:
    """The members from `place` on whose names have a key, those with the same one together, copied into `spool`.

    `wanted` is asked at every member, so that what it raises ends the reading at once; `expected` says in words which
    names have a key.

    Raises:
        DamagedArchive: after the last that can be read.
        BarrenArchive: at its end, where no name has a key.
    """
    run: Run | None = None
    number = others = 0
    other = ""
    try:
        for member in members(archive, place):
            is_wanted, key = wanted(number), key_of(member.name)
            if key is None:
                if not is_stray(member.name):
                    others, other = others + 1, other or member.name
                continue
            if run is not None and run.key != key:
                yield run
                run, number = None, number + 1
                is_wanted = wanted(number)
            run = run or Run(archive, key, member.place, passed_over=not is_wanted)
            if run.passed_over:
                continue
            if len(run.files) >= MAX_FILES:
                raise DamagedArchive(f"{archive}: more than {MAX_FILES} members of {key!r:.60}; download it again")
            path = member.save(spool)
            if member.name in run.files:
                run.files[member.name].unlink()
            run.files[member.name] = path
    except DamagedArchive:
        if run is not None:
            run.cut_off = True
            yield run
        raise
    if run is not None:
        yield run
    elif not place:
        held = f"none of its {others} files is {expected}; the first is {other!r:.200}" if others else "holds no files"
        raise BarrenArchive(f"{archive}: {held}")


def list_files(location: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files with these endings at `location`, a file or a folder of any depth, local or `hf://`, sorted by name.

    UserError where there are none, or they can't be listed.
    """
    try:
        files, root = _files(location)
        found = [root] if files.isfile(root) else files.find(root)
        named = [name for name in found if name.lower().endswith(suffixes)]
        meant = [name for name in named if name == root or not is_stray(os.path.relpath(name, root))]
        chosen = sorted(files.unstrip_protocol(name) for name in meant)
    except Exception as error:  # the hub's client has a dozen kinds, of being offline and of unknown names
        raise UserError(f"{location}: can't be listed ({first_line(error)}); check name and network") from error
    if not chosen:
        raise UserError(f"{location}: no {' or '.join(suffixes)} files there; check data.root and the source's path")
    return [name.removeprefix("file://") for name in chosen]


def read_bytes(url: str) -> bytes:
    """The content of a file, local or `hf://`. UserError where it can't be read."""
    with opened_file(url) as file:
        try:
            return bytes(file.read())
        except Exception as error:
            raise UserError(f"{url}: can't be read ({first_line(error)}); check the disk or network") from error


def members(archive: str, place: int = 0) -> Iterator[Member]:
    """The regular files of an archive in order, from `place` on. Links and devices are passed over.

    Raises:
        DamagedArchive: after all that can be read.
        UserError: the archive can't be opened, or its disk or network fails.
    """
    with opened_file(archive) as opened:
        with _reading(archive):
            begin = opened.read(10)  # what it is, whatever it is called
            opened.seek(0)
        if kind := next((kind for magic, kind in OTHER_KINDS.items() if re.match(magic, begin)), ""):
            raise DamagedArchive(f"{archive}: is packed by {kind}, which is not read; pack it as .tar or .tar.gz")
        is_plain = not begin.startswith(b"\x1f\x8b")
        file = opened if is_plain else _Unpacked(opened)
        with _reading(archive):
            file.seek(place)
            # Offsets count from the file's start, wherever it stands; those of headers rise, so nothing is read twice.
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
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep the headers of a whole archive
                content = tar.extractfile(entry) if entry.isreg() else None
            if content is not None:
                yield Member(archive, entry.name.removeprefix("./"), entry.offset, content)


class _Unpacked(gzip.GzipFile):
    """The content of a compressed archive, up to where it turns out to be a bomb."""

    def __init__(self, packed: Any) -> None:
        super().__init__(fileobj=packed)
        self.packed = packed

    def read(self, size: int | None = -1) -> bytes:
        """As of any file. tarfile.ReadError at a bomb."""
        content = super().read(size)
        if self.tell() > max(SUSPECT_BYTES, MAX_RATIO * self.packed.tell()):
            raise tarfile.ReadError(f"unpacks to more than {MAX_RATIO} times its size")
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Forward in steps, each of them looked at."""
        while whence == os.SEEK_SET and self.tell() < offset and self.read(min(CHUNK_BYTES, offset - self.tell())):
            pass
        return super().seek(offset, whence)


class _Header(tarfile.TarInfo):
    """A header that is cut off or garbled is damage. tarfile by itself takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """A header out of its block; tarfile.HeaderError where it announces absurdly long remarks."""
        entry = super().frombuf(buf, encoding, errors)
        if entry.type in _REMARKS and entry.size > MAX_HEADER_BYTES:
            raise tarfile.HeaderError(f"{entry.size} bytes of remarks on a member")
        return entry

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """The next header; EOFHeaderError at the block of zeros that ends an archive."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed leaves it out
            raise
        except (tarfile.HeaderError, ValueError, IndexError) as error:
            raise tarfile.ReadError(f"cut off or garbled ({first_line(error)})") from error


@contextmanager
def _reading(archive: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise DamagedArchive(f"{archive}: {first_line(error)}; download it again") from error
    except Exception as error:  # of the disk, of the hub's client, of its network library: no class in common
        raise UserError(f"{archive}: can't be read ({first_line(error)}); check the disk or network") from error


@contextmanager
def opened_file(url: str) -> Iterator[Any]:
    """A file, local or `hf://`, to read from. UserError where it can't be opened."""
    try:
        files, path = _files(url)
        opened = files.open(path, "rb")  # remote: blocks of 5 MB read ahead, which suits reading from front to back
    except Exception as error:
        raise UserError(f"{url}: can't be opened ({first_line(error)}); check the name and the network") from error
    with opened as file:
        yield file


def _files(location: str) -> tuple[Any, str]:
    """The file system that holds a location, and its path there."""
    if location.startswith("hf://"):
        return url_to_fs(location)
    if os.path.exists(location) and not os.path.isfile(location) and not os.path.isdir(location):
        raise OSError("is no regular file")  # a FIFO would block whoever opens it
    return LocalFileSystem(), os.path.abspath(location)  # not by fsspec's rules: it splits names at "::"
