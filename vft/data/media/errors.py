"""`MediaError`: what can be wrong with a media file, with a reason from a fixed set; and the checks that raise it."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import stat_result
from pathlib import Path
from typing import Literal

from vft.common.errors import first_line

MAX_FRAME_PIXELS = 89_478_485
"""Pixels of a frame or picture above which it is refused (PIL's own limit against decompression bombs)."""

Reason = Literal[
    "missing",
    "not_a_file",
    "unreadable",
    "empty",
    "truncated",
    "not_a_video",
    "not_a_picture",
    "no_video_stream",
    "mixed_sizes",
    "too_large",
    "decode_error",
    "changed",
    "deadline",
    "crashed",
]


class MediaError(Exception):
    """One medium cannot be used; the run can go on. `str()` is one line: the path, what is wrong, how to fix it."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args: unpickling in another process calls __init__(*args)
        self.reason: Reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def as_media_error(path: Path) -> Iterator[None]:
    """Turn any exception that a damaged file causes into a MediaError: one odd clip must not end a run.

    AssertionErrors pass through: they are bugs of our own.
    """
    try:
        yield
    except (MediaError, AssertionError):
        raise
    except Exception as error:
        message = f"{path}: {type(error).__name__}: {first_line(error)}; download or encode it anew"
        raise MediaError("decode_error", message) from error


def check_file(path: Path) -> stat_result:
    """The status of a regular file that is not empty. (Opening a FIFO, for instance, would block.)

    Links in the paths of records have been resolved, so a link here was put in the file's place later.

    Raises:
        MediaError: `missing`, `unreadable`, `not_a_file` or `empty`.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the index cannot hold such a name, nor a terminal show it
        raise MediaError("unreadable", f"{str(path)!a}: its name is not UTF-8; rename the file") from None
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name with a zero byte
        raise MediaError("missing", f"{path}: no such file; check the path in the record and data.root") from None
    except OSError as error:
        raise MediaError("unreadable", f"{path}: {error.strerror}; check the file's permissions and its disk") from None
    if not stat.S_ISREG(status.st_mode):
        what = "has become a link" if stat.S_ISLNK(status.st_mode) else "is no regular file"
        raise MediaError("not_a_file", f"{path}: {what}; name a video or picture file")
    if status.st_size == 0:
        raise MediaError("empty", f"{path}: has 0 bytes; download it again")
    return status


def check_size(path: Path, width: int, height: int) -> None:
    """MediaError `too_large` if a frame of this size has more pixels than is allowed."""
    if width * height > MAX_FRAME_PIXELS:
        raise too_large(path, f"{width}x{height}")


def too_large(path: Path, what: str) -> MediaError:
    """The error for a frame or picture with too many pixels."""
    return MediaError("too_large", f"{path}: {what} is over the limit of {MAX_FRAME_PIXELS} pixels; make it smaller")
