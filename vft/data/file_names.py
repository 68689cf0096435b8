"""File names in real data sets: files that systems leave behind, and other spellings of a path."""

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
"""Names of folders and files that hold the splits of a data set."""
STRAY = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "@eadir", "$recycle.bin", "system volume information"}
    | {"lost+found"}
)
"""Files that systems put beside a user's, in lower case. Archives made by macOS hold a second file for each, `._NAME`
in `__MACOSX`. Names of hidden files begin with a dot."""


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name, with or without its folders, is a system's own or hidden."""
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
    """A Windows path (`D:\\a\\b.mp4`, `\\\\host\\share\\b.mp4`) without its drive or host, with `/`; None for other
    paths."""
    if not _ON_A_DRIVE.match(path):
        return None
    return ntpath.splitdrive(path)[1].replace("\\", "/").lstrip("/")
