"""Names of files as people have them: what no one means by a data set, and the other spellings of a path."""

from __future__ import annotations

import ntpath
import os
import re
import unicodedata
from collections.abc import Iterator

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".wmv", ".flv", ".3gp"}
    | {".ogv"}
)
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"})
_ON_A_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "held_out")
"""What folders and files of the splits of a data set are called."""
STRAY = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "@eadir", "$recycle.bin", "system volume information"}
    | {"lost+found"}
)
"""What systems leave beside a user's files, in lower case; macOS's archives hold a shadow of each file, `._NAME`, in
`__MACOSX`. Hidden files begin with a dot."""


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name, which may have folders before it, is a system's own or hidden."""
    return any((part[:1] == "." and part not in (".", "..")) or part.lower() in STRAY for part in name.split("/"))


def spellings(path: str) -> Iterator[str]:
    """`path`, then its other forms: with `/`, in Unicode's NFC and NFD, the suffix in lower and upper case."""
    seen = set()
    for slashed in (path, path.replace("\\", "/")):
        for form in (slashed, unicodedata.normalize("NFC", slashed), unicodedata.normalize("NFD", slashed)):
            stem, suffix = os.path.splitext(form)
            for one in (form, stem + suffix.lower(), stem + suffix.upper()):
                if one not in seen:
                    seen.add(one)
                    yield one


def without_drive(path: str) -> str | None:
    """What follows the drive or host of a Windows path (`D:\\a\\b.mp4`, `\\\\host\\share\\b.mp4`), with `/`; None of
    other paths."""
    if not _ON_A_DRIVE.match(path):
        return None
    return ntpath.splitdrive(path)[1].replace("\\", "/").lstrip("/")
