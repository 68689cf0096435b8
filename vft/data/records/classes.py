"""Labelled clips: a closed set of classes, and the sample that a clip and its class make."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample, Turn
from vft.data.records.files import read_lines
from vft.data.records.record import short_repr


def labelled_sample(
    sample_id: str,
    ref: MediaRef,
    label: str,
    labels: tuple[str, ...],
    origin: str,
    unread: Iterable[str] = (),
    **fields: str,
) -> Sample:
    """A clip and its class, without a question: the task asks. `labels` are all classes of the set, `unread` the keys
    of the record that the format does not read."""
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
            raise UserError(f"{path}: class {short_repr(name)} gives an empty label; rename it")
        if names_of.setdefault(label, name) != name:
            both = f"{short_repr(names_of[label])} and {short_repr(name)}"
            raise UserError(f"{path}: classes {both} give the same label {short_repr(label)}; rename one of them")
    return {name: label for label, name in names_of.items()}


def read_classes(*folders: Path) -> tuple[Path, list[str]] | None:
    """The first `classes.txt` (a name a line) in `folders`, and its names. None if there is none."""
    for folder in folders:
        path = folder / "classes.txt"
        if path.is_file():
            names = [line for _, line in read_lines(path)]
            if not names:
                raise UserError(f"{path}: holds no names; write a class a line, or take the file away")
            return path, names
    return None
