"""The paths that records name, as files inside `data.root`; nothing outside is opened.

Also what is usual in real data sets: files that systems leave behind, and other spellings of a path.
"""

from __future__ import annotations

import ntpath
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from vft.data.records.inputs import note
from vft.data.records.record import RecordError, check_text, short_repr

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".ts", ".wmv", ".flv", ".3gp"}
    | {".ogv"}
)
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".ppm"})
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "held_out")
"""Names of folders and files that hold the splits of a data set."""
STRAY = frozenset(
    {"__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "@eadir", "$recycle.bin", "system volume information"}
    | {"lost+found"}
)
"""Files that systems put beside a user's, in lower case. Archives made by macOS hold a second file for each, `._NAME`
in `__MACOSX`. Names of hidden files begin with a dot."""
_ON_A_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_DIGITS = re.compile(r"([0-9]+)")
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://|(?:file|data|https?):")
_FILE_URL = re.compile(r"\Afile://(?=/)")
"""How Qwen's own examples write an absolute path: nothing in it is decoded, as there."""


def resolve_media(root: Path, value: object, field: str) -> Path:
    """The file that a record names, relative to `root`, with symbolic links followed. It may be missing.

    If no file has exactly that name, its other spellings are tried: `/` for `\\`, NFC and NFD, the suffix in the other
    case.

    Raises:
        RecordError: a URL, a Windows drive, a path that leads out of `root`, or anything but a regular file.
    """
    path, mode = resolve_path(root, value, field)
    if mode and not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise RecordError(field, f"{short_repr(value)} is {what}; name a file")
    return path


def resolve_path(root: Path, value: object, field: str) -> tuple[Path, int]:
    """As `resolve_media`, for files and folders. Also the mode of what is there, 0 if nothing is."""
    text = _FILE_URL.sub("", check_text(value, field), count=1)
    if not text or "\0" in text:
        raise RecordError(field, f"{short_repr(text)} is no path; name a file under data.root")
    on_drive = without_drive(text)
    if _URL.match(text) and on_drive is None:
        raise RecordError(field, f"{short_repr(text)}: URLs in records are off; download it, and name the file")
    real, mode, top = look_up(root, text)
    if on_drive is not None and not mode:
        what = f"{short_repr(text)} is a path of Windows; there is no such drive here"
        raise RecordError(field, f"{what}: {_suggest_relative(root, on_drive)}")
    if os.path.commonpath([top, real]) != top:
        way_out = f"{short_repr(text)} leads to {real!r}, out of data.root = {top!r}"
        raise RecordError(field, f"{way_out}; move the file there, or set data.root: {_suggest_relative(root, text)}")
    return Path(real), mode


def _suggest_relative(root: Path, path: str) -> str:
    """How to write a path from elsewhere: the longest end of it that exists in `root`, if any does."""
    parts = path.strip("/").split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    found = next((tail for tail in tails if tail and ".." not in parts and look_up(root, tail)[1]), "")
    return f"write {short_repr(found)}" if found else "write it relative to data.root, with '/'"


@lru_cache(maxsize=65536)  # several records of a video often follow each other, and the disk is slow
def look_up(root: Path, text: str) -> tuple[str, int, str]:
    """The real path of `text` under `root`, its mode (0 if it does not exist or cannot be seen), and the real path of
    `root`."""
    top = os.path.realpath(root)
    for spelling in spellings(text):
        asked = os.path.join(top, spelling)
        real = os.path.realpath(asked)
        try:
            mode = os.stat(real).st_mode
        except OSError:
            note(asked)
            continue
        if real != asked or not stat.S_ISREG(mode):  # a file's own size and time are kept with its scan
            note(asked)
        return real, mode, top
    return os.path.realpath(os.path.join(top, text)), 0, top


def find_path(root: Path, path: str) -> Path:
    """The file or folder `path` in `root`, in the spelling that exists; as it is written if none does."""
    return next((root / form for form in spellings(path) if os.path.exists(root / form)), root / path)


def path_exists(root: Path, path: str) -> bool:
    """Whether `root` has a file or folder `path`, in any of its spellings. False if the name is too long for a file."""
    return any(_is_there(root / form) for form in spellings(path))


def _is_there(path: Path | str) -> bool:
    """Whether there is a file or folder. If so, a record shows it, and it is among the media."""
    if os.path.exists(path):
        return True
    note(path)
    return False


def resolve_frames(root: Path, value: object, field: str) -> tuple[Path, ...]:
    """The pictures in a folder under `root`, in the order of the numbers in their names.

    Raises:
        RecordError: as `resolve_media`; also if there are no pictures.
    """
    folder, _ = resolve_path(root, value, field)
    note(folder)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise RecordError(field, f"the folder {folder} can't be read ({error.strerror}); fix its permissions") from None
    pictures = [name for name in names if Path(name).suffix.lower() in PICTURE_SUFFIXES and not is_stray(name)]
    if not pictures:
        raise RecordError(field, f"the folder {folder} has no pictures; name a folder of frames or a video")
    return tuple(resolve_media(root, str(folder / name), field) for name in natural_order(pictures))


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted by the numbers in them: `f2` before `f10`."""
    return sorted(
        names, key=lambda n: [(int(part), "") if part.isdecimal() else (0, part) for part in _DIGITS.split(n)]
    )


# ------------------------------------------------------------------------------------ media in one of several places


def media_folders(path: Path, root: Path, media: str, *names: str) -> list[str]:
    """The folders in which the media of the list (or folder of lists) at `path` may be, the likeliest first.

    With `media`, that is this folder of `root`. Otherwise the folders called `names` (the name "" is the place itself)
    beside the list, one level above, and in `root`, if they exist and are inside `root`.
    """
    top = os.path.realpath(root)
    if media:
        return [os.path.join(top, media)]
    beside = os.path.realpath(path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path)))
    places = dict.fromkeys((beside, os.path.dirname(beside), top))
    folders = [os.path.join(place, name) for name in names for place in places]
    inside = [folder for folder in folders if os.path.isdir(folder) and os.path.commonpath([top, folder]) == top]
    return inside or [top]


def first_present(root: Path, names: Iterable[str], field: str) -> Path:
    """The first of the files `names`, relative to `root`, that exists; the first of all if none does.

    Raises:
        RecordError: as `resolve_media`.
    """
    names = list(names)
    # Faster than to resolve each: a list may name a hundred thousand files of which many do not exist.
    exact = (name for name in names if _is_there(os.path.join(root, name)))
    present = next(exact, None) or next((name for name in names if path_exists(root, name)), names[0])
    return resolve_media(root, present, field)


# -------------------------------------------------------------------------------------------------- names of files


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
