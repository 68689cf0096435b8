"""Tar archives, on disk or on the hub, read from start to end, and again from the place where reading stopped.

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from vft.common.errors import UserError, first_line
from vft.data.streaming.files import open_file

SUFFIXES = (".tar", ".tar.gz", ".tgz")
CHUNK_BYTES = 1 << 20
MAX_MEMBER_BYTES = 16 << 30
"""Hours of video at the quality of a disc."""
MAX_HEADER_BYTES = 1 << 20
"""Of a long name or other extended header of a member, which tarfile reads into memory."""
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
