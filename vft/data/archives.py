"""Tar archives, on disk or on the hub, read from front to back, and picked up again where one stopped.

A place in an archive is a number: of a plain tar the byte where a member's header begins, so that going on there reads
nothing before it; of a compressed one, which can't be entered in the middle, how many members come before.
"""

from __future__ import annotations

import gzip
import itertools
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from vft.types import UserError

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_NUMBERS = itertools.count()
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


class DamagedArchive(Exception):
    """An archive is cut off or isn't one; what comes before the damage can be used. `str()` is one line."""


@dataclass(frozen=True)
class Member:
    """One regular file in an archive; `save` it before going on to the next."""

    archive: str
    name: str
    place: int
    file: IO[bytes]

    @property
    def title(self) -> str:
        """`shard.tar/name`, for records and messages."""
        return f"{self.archive.rsplit('/', 1)[-1]}/{self.name}"

    def save(self, folder: Path) -> Path:
        """Copy the content to a file in `folder`, under a name that this process has not used before."""
        path = folder / f"{next(_NUMBERS):08d}{Path(self.name).suffix.lower()}"
        with path.open("wb") as target:
            shutil.copyfileobj(self.file, target, 1 << 20)
        return path


def list_files(location: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files with these endings at `location`, a file or a folder of any depth, local or `hf://`, sorted by name.

    UserError where there are none, or they can't be listed.
    """
    try:
        files, root = url_to_fs(location)
        found = [root] if files.isfile(root) else files.find(root)
        chosen = sorted(files.unstrip_protocol(name) for name in found if name.endswith(suffixes))
    except Exception as error:  # the hub's client has a dozen kinds, of being offline and of unknown names
        raise UserError(f"{location}: can't be listed ({_first_line(error)}); check name and network") from error
    if not chosen:
        raise UserError(f"{location}: no {' or '.join(suffixes)} files there; check data.root and the source's path")
    return [name.removeprefix("file://") for name in chosen]


def read_bytes(url: str) -> bytes:
    """The content of a file, local or `hf://`. UserError where it can't be read."""
    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read())
    except Exception as error:
        raise UserError(f"{url}: can't be read ({_first_line(error)}); check the name and the network") from error


def members(archive: str, place: int = 0) -> Iterator[Member]:
    """The regular files of an archive in order, from `place` on. Links and devices are passed over.

    Raises:
        DamagedArchive: after all that can be read.
        UserError: the archive can't be opened, or its disk or network fails.
    """
    is_plain = archive.endswith(".tar")
    with _opened(archive) as file:
        if is_plain:
            file.seek(place)
        number = 0
        try:
            # Offsets count from the file's start, wherever it stood when it was opened.
            with tarfile.open(fileobj=file, mode="r:" if is_plain else "r|gz") as tar:
                while (entry := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep the headers of a whole archive
                    here = entry.offset if is_plain else number
                    number += 1
                    content = tar.extractfile(entry) if entry.isreg() and (is_plain or here >= place) else None
                    if content is not None:
                        yield Member(archive, entry.name.removeprefix("./"), here, content)
                if is_plain:
                    _check_end(file, tar.offset)
        except _DAMAGE as error:
            raise DamagedArchive(f"{archive}: {_first_line(error)}; download it again") from error
        except OSError as error:
            raise UserError(f"{archive}: can't be read ({_first_line(error)}); check the disk or network") from error


def _check_end(file: IO[bytes], place: int) -> None:
    """tarfile takes a cut header for the end; a whole archive ends with a block of zeros."""
    file.seek(place)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is cut off")


@contextmanager
def _opened(archive: str) -> Iterator[Any]:
    try:
        # Blocks of 5 MB read ahead suit a file that is read from front to back.
        opened = fsspec.open(archive, "rb").open()
    except Exception as error:
        raise UserError(f"{archive}: can't be opened ({_first_line(error)}); check the name and the network") from error
    with opened as file:
        yield file


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
