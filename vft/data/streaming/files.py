"""Files of a data set, on disk or on the hub (`hf://`): listing and reading them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from vft.common.errors import UserError, first_line
from vft.data.file_names import is_stray


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
    with open_file(url) as file:
        try:
            return bytes(file.read())
        except Exception as error:
            raise UserError(f"{url}: can't be read ({first_line(error)}); check the disk or network") from error


def _file_system(location: str) -> tuple[Any, str]:
    """The fsspec file system that holds a location, and the path in it."""
    if location.startswith("hf://"):
        return url_to_fs(location)
    if os.path.exists(location) and not os.path.isfile(location) and not os.path.isdir(location):
        raise OSError("is no regular file")  # opening a FIFO would block
    return LocalFileSystem(), os.path.abspath(location)  # url_to_fs would split a name at "::"
