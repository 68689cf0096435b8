"""Kinetics-400, -600, -700: CSV lists of clips of YouTube videos, named by video and seconds.

The columns are `label,youtube_id,time_start,time_end,split` and in some releases `is_cc`; a clip is the file
`{youtube_id}_{time_start:06d}_{time_end:06d}.mp4`. Lists to test on have no labels.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.records.files import labelled_sample, read_classes, read_table
from vft.data.records.paths import find_path, first_present, media_folders
from vft.data.records.record import RecordError, Records, as_object, make_samples, short_repr

COLUMNS = ("label", "youtube_id", "time_start", "time_end")
MORE_COLUMNS = ("split", "is_cc")
"""Others that releases have."""
REPLACEMENTS = ("replacement/replacement_for_corrupted_k400", "replacement")
"""Where cvdfoundation's scripts unpack the clips of Kinetics-400 that were published again, because the first were
damaged (kinetics-dataset, k400_extractor.sh)."""
_VIDEO = re.compile("[A-Za-z0-9_-]+")
_SECONDS = re.compile("[0-9]{1,6}")


class Kinetics(Format):
    """The clips of one CSV file.

    A clip is in `media`, or in a folder with the label's name there (with spaces or underscores); without `media`, in a
    folder called as the CSV file is, or beside it. A file in `replacement`, in or beside that folder, is preferred. All
    labels are those of `classes.txt` (a name a line) beside the CSV file, else those that occur in it: a list to
    validate on may lack some.
    """

    settings = frozenset({"media"})

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`. UserError also if `classes.txt` cannot be read, or the list has no labels."""
        path, root = find_path(data.root, source.path), data.root
        header, rows = read_table(path)
        missing = [name for name in COLUMNS if name not in header]
        if missing == ["label"]:
            fix = "give the list to train or validate on"
            raise UserError(f"{path}: no column 'label', as in the lists to test on; {fix}")
        if missing:
            expected = f"expected {','.join(COLUMNS)},split in the first line"
            raise UserError(f"{path}:1: columns {short_repr(header)}; {expected}")
        records = [(f"{path.name}:{line}", record) for line, record in rows]
        occurring = {record["label"] for _, record in records if isinstance(record, dict) and record["label"]}
        file, names = read_classes(path.parent) or (path, sorted(occurring))
        labels = tuple(names)
        known = frozenset(labels)
        folders = media_folders(path, root, source.media, path.stem, "")
        folders = [*_replacements(folders, root), *folders]
        # To look for the folder of each label for each clip would take long.
        inner_folders = {folder: next(os.walk(folder), ("", [], []))[1] for folder in folders}

        def parse(value: Any, origin: str) -> list[Sample]:
            record = as_object(value)
            label, video, *seconds = (record[name] or "" for name in COLUMNS)
            if label not in known:
                raise RecordError("label", f"{short_repr(label)} is no label of {file.name}; correct one of them")
            if not _VIDEO.fullmatch(video):
                raise RecordError("youtube_id", f"{short_repr(video)} must be letters, digits, '-' and '_'; correct it")
            for name, value in zip(COLUMNS[2:], seconds, strict=True):
                if not _SECONDS.fullmatch(value):
                    raise RecordError(
                        name, f"{short_repr(value)} must be a whole number of seconds, of up to six digits"
                    )
            clip = "_".join([video, *(f"{int(value):06d}" for value in seconds)])
            labels_as_folders = dict.fromkeys((label, label.replace(" ", "_")))
            places = [f"{folder}/{clip}.mp4" for folder in folders] + [
                f"{folder}/{name}/{clip}.mp4"
                for folder in folders
                for name in labels_as_folders
                if "/" in name or name in inner_folders[folder]
            ]
            ref = MediaRef("video", first_present(root, places, "youtube_id"), field="youtube_id")
            unread = (name for name, value in record.items() if value and name not in (*COLUMNS, *MORE_COLUMNS))
            return [labelled_sample(clip, ref, label, labels, origin, unread)]

        return make_samples(records, parse)


def _replacements(folders: list[str], root: Path) -> list[str]:
    """The folders of clips that replace damaged ones, in or beside those of the clips."""
    top = os.path.realpath(root)
    places = dict.fromkeys(place for folder in folders for place in (folder, os.path.dirname(folder)))
    inside = [place for place in places if os.path.commonpath([top, place]) == top]
    candidates = [os.path.join(place, name) for place in inside for name in REPLACEMENTS]
    return [folder for folder in candidates if os.path.isdir(folder)]
