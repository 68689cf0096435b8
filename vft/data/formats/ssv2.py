"""Something-Something v2: JSON lists of `{"id", "label", "template", "placeholders"}`, videos `{id}.webm`.

The class is `template` without its brackets, numbered in `labels.json` beside the list; `label` is the template filled
in, a caption. The list to test on has ids only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.data.formats import tables
from vft.data.formats.records import (
    BadRecord,
    RecordError,
    as_object,
    check_text,
    gather,
    read_json,
    sample_id_of,
    shown,
)

LABELS = ("labels.json", "something-something-v2-labels.json")
"""Names of the file of classes in the releases of this set."""
KEYS = frozenset({"id", "label", "template", "placeholders"})
"""Of a record in the releases of this set."""
_NO_BRACKETS = str.maketrans("", "", "[]")


def read(path: Path, root: Path, media: str = "") -> tuple[list[Sample], list[BadRecord]]:
    """The clips of one list, and its records that can't be used; files lie in `media` or `20bn-something-something-v2`.

    The filled-in template is kept as `fields["caption"]`.

    Raises:
        UserError: the list or `labels.json` can't be read, or the list has no classes.
    """
    rows = [(f"{path.name}:{line}", record) for line, record in read_json(path)]
    if rows and not any(isinstance(record, dict) and "template" in record for _, record in rows):
        raise UserError(f"{path}: no record has a 'template', as in the list to test on; give one with classes")
    labels = _read_labels(path.parent)
    known = frozenset(labels)
    folders = tables.media_folders(path, root, media, "20bn-something-something-v2", "")

    def parse(record: Any, origin: str) -> list[Sample]:
        record = as_object(record)
        video = sample_id_of(record, "")
        template, caption = (check_text(record.get(key), key) for key in ("template", "label"))
        label = template.translate(_NO_BRACKETS).strip()
        if label not in known:
            raise RecordError("template", f"{shown(label)} is no class of labels.json; mend either")
        if not video:
            raise RecordError("id", "is missing or empty; give the name of the video's file")
        file = tables.first_present(root, [f"{folder}/{video}.webm" for folder in folders], "id")
        ref = MediaRef("video", file, field="id")
        unread = (key for key, value in record.items() if key not in KEYS and value is not None)
        return [tables.labelled(video, ref, label, labels, origin, unread, caption=caption)]

    return gather(rows, parse)


def _read_labels(folder: Path) -> tuple[str, ...]:
    """All classes in the order of their numbers."""
    path = next((folder / name for name in LABELS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder / LABELS[0]}: No such file; put the set's list of classes beside the list of clips")
    (_, table), *more = list(read_json(path)) or [(1, None)]
    try:
        names = sorted(table, key=lambda name: int(table[name]))
        "".join(names).encode()  # half a surrogate pair
    except (TypeError, ValueError, OverflowError):
        names = []
    if more or not names or not all(names):
        raise UserError(f'{path}:1: must be one object of classes with their numbers, as {{"Holding something": "0"}}')
    return tuple(names)
