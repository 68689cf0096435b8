"""What can be wrong with a media file: `MediaError`, with a reason from a fixed set."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from os import stat_result
from pathlib import Path
from typing import Literal

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
    """One medium can't be used; the run can go on. `str()` is one line: the path, what is wrong, the mend."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args: pickling between processes calls __init__(*args)
        self.reason: Reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextmanager
def as_media_error(path: Path) -> Iterator[None]:
    """Make whatever a damaged file brings about a MediaError: one odd clip must not end a run. Our own bugs stay."""
    try:
        yield
    except (MediaError, AssertionError):
        raise
    except Exception as error:
        message = f"{path}: {type(error).__name__}: {first_line(error)}; download or encode it anew"
        raise MediaError("decode_error", message) from error


def check_file(path: Path) -> stat_result:
    """The status of a regular file that isn't empty; a FIFO, say, would block whoever opens it.

    Paths of records have their links followed, so that a link is what somebody put there since.

    Raises:
        MediaError: `missing`, `unreadable`, `not_a_file` or `empty`.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the index can't hold it, nor a terminal show it
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


def first_line(error: BaseException) -> str:
    """What it says, without the place in FFmpeg's or PIL's code."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]
