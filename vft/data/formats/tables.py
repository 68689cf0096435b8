"""What readers of lists and tables share: lines of text, media that may lie in several folders, labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample, Turn
from vft.data.formats.records import decode_text, is_there, read_file, resolve_media, shown

# ------------------------------------------------------------------------------------------------------------- text


def read_text(path: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        UserError: it can't be read, or isn't UTF-8; names file and line.
    """
    return decode_text(read_file(path, "a text file"), str(path))


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, without the space around them, with their numbers from 1."""
    return [(i, line.strip()) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


# ------------------------------------------------------------------------------------------------------------ media


def media_folders(path: Path, root: Path, media: str, *names: str) -> list[str]:
    """Where to look for the media of the list (or folder of lists) at `path`, most likely first.

    That is `media` (relative to `root`) if given; else the folders called `names` beside the list, one above, and in
    `root` (the name "" stands for these places themselves), as far as they are there and inside `root`.
    """
    top = os.path.realpath(root)
    if media:
        return [os.path.join(top, media)]
    beside = os.path.realpath(path if os.path.isdir(path) else os.path.dirname(os.path.abspath(path)))
    places = dict.fromkeys((beside, os.path.dirname(beside), top))
    found = [os.path.join(place, name) for name in names for place in places]
    inside = [folder for folder in found if os.path.isdir(folder) and os.path.commonpath([top, folder]) == top]
    return inside or [top]


def first_present(root: Path, names: Iterable[str], field: str) -> Path:
    """The first of the files `names`, relative to `root`, that is there; the first of all where none is.

    Raises:
        RecordError: as `resolve_media`.
    """
    names = list(names)
    # Quicker than to resolve each: a list may name a hundred thousand files of which many are not there.
    there = (name for name in names if os.path.exists(os.path.join(root, name)))
    found = next(there, None) or next((name for name in names if is_there(root, name)), names[0])
    return resolve_media(root, found, field)


# ----------------------------------------------------------------------------------------------------------- labels


def labelled(
    sample_id: str,
    ref: MediaRef,
    label: str,
    labels: tuple[str, ...],
    origin: str,
    unread: Iterable[str] = (),
    **fields: str,
) -> Sample:
    """A clip and its class: no question, which is the task's to ask. `labels` are all classes of the set, `unread` the
    record's keys that nothing reads."""
    turns = (Turn("user", (ref,)), Turn("assistant", (label,)))
    return Sample(sample_id, turns, origin, {"label": label, "labels": labels, **fields}, tuple(unread))


def label_classes(names: Iterable[str], to_label: Callable[[str], str], path: Path) -> dict[str, str]:
    """The label of each class name.

    Raises:
        UserError: two names have the same label, or one has none; names `path`, where they come from.
    """
    names_of: dict[str, str] = {}
    for name in names:
        label = to_label(name)
        if not label:
            raise UserError(f"{path}: class {shown(name)} gives an empty label; rename it")
        if names_of.setdefault(label, name) != name:
            both = f"{shown(names_of[label])} and {shown(name)}"
            raise UserError(f"{path}: classes {both} give the same label {shown(label)}; rename one of them")
    return {name: label for label, name in names_of.items()}


def read_classes(*folders: Path) -> tuple[Path, list[str]] | None:
    """The first `classes.txt` (a name a line) in `folders`, and its names; None where there is none."""
    for folder in folders:
        path = folder / "classes.txt"
        if path.is_file():
            names = [line for _, line in read_lines(path)]
            if not names:
                raise UserError(f"{path}: holds no names; write a class a line, or take the file away")
            return path, names
    return None
