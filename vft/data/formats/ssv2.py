"""Something-Something v2: JSON lists of `{"id", "label", "template", "placeholders"}`, videos `{id}.webm`.

The class is `template` without its brackets, numbered in `labels.json` beside the list; `label` is the template filled
in, a caption. The list to test on has ids only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.records.files import labelled_sample, read_json
from vft.data.records.paths import find_path, first_present, media_folders
from vft.data.records.record import RecordError, Records, as_object, check_text, make_samples, record_id, short_repr

LABELS = ("labels.json", "something-something-v2-labels.json")
"""Names of the file of classes in the releases of this set."""
KEYS = frozenset({"id", "label", "template", "placeholders"})
"""Keys of a record in the releases of this set."""
_NO_BRACKETS = str.maketrans("", "", "[]")


class SomethingSomethingV2(Format):
    """The clips of one list; files are in `media` or `20bn-something-something-v2`. The filled-in template is kept as
    `fields["caption"]`."""

    settings = frozenset({"media"})

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`. UserError also if `labels.json` cannot be read, or the list has no classes."""
        path = find_path(data.root, source.path)
        rows = [(f"{path.name}:{line}", record) for line, record in read_json(path)]
        if rows and not any(isinstance(record, dict) and "template" in record for _, record in rows):
            raise UserError(f"{path}: no record has a 'template', as in the list to test on; give one with classes")
        labels = _read_labels(path.parent)
        known = frozenset(labels)
        folders = media_folders(path, data.root, source.media, "20bn-something-something-v2", "")

        def parse(record: Any, origin: str) -> list[Sample]:
            record = as_object(record)
            video = record_id(record, "")
            template, caption = (check_text(record.get(key), key) for key in ("template", "label"))
            label = template.translate(_NO_BRACKETS).strip()
            if label not in known:
                raise RecordError("template", f"{short_repr(label)} is no class of labels.json; correct one of them")
            if not video:
                raise RecordError("id", "is missing or empty; give the name of the video's file")
            file = first_present(data.root, [f"{folder}/{video}.webm" for folder in folders], "id")
            ref = MediaRef("video", file, field="id")
            unread = (key for key, value in record.items() if key not in KEYS and value is not None)
            return [labelled_sample(video, ref, label, labels, origin, unread, caption=caption)]

        return make_samples(rows, parse)


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
