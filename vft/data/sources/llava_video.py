"""LLaVA-Video-178K: JSON lists of conversations about videos that lie in folders of several layouts.

Records hold `conversations`, `data_source` and `video`; the video's placeholder is literally `<image>\\n`. The card of
the dataset is the source of the layout; llava_hound's "videos" are folders of frames.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vft.data.sources import messages
from vft.data.sources.records import BadRecord, RecordError, check_text, collect, resolve_frames, resolve_path
from vft.types import Sample, Turn, UserError


def read(path: Path, root: Path) -> tuple[list[Sample], list[BadRecord]]:
    """The samples of one JSON file, or of every JSON file in a folder, and the records that can't be used.

    Raises:
        UserError: a file as a whole can't be read, or there is none.
    """
    if not path.is_dir():
        return collect([(path, path.name)], lambda record, file: _parse(record, file, root))
    files = sorted(path.rglob("*.json"))
    if not files:
        raise UserError(f"{path}: the folder has no .json files; give a file, or the folder that holds them")
    named = [(file, file.relative_to(path).as_posix()) for file in files]
    return collect(named, lambda record, file: _parse(record, file, root))


def _parse(record: Mapping[str, Any], file: Path, root: Path) -> tuple[Turn, ...]:
    if "video" not in record:
        found = ", ".join(repr(key) for key in record) or "no fields"
        raise RecordError("video", f"is missing; the record has {found}")
    video = check_text(record["video"], "video")
    located, mode = resolve_path(root, video, "video")
    for folder in filter(None, (_config(file, root), record.get("data_source"))):
        if mode:
            break
        candidate, found_mode = resolve_path(root, f"{check_text(folder, 'data_source')}/{video}", "video")
        if found_mode:
            located, mode = candidate, found_mode
    value: Any = str(located)
    if stat.S_ISDIR(mode):
        value = [str(frame) for frame in resolve_frames(root, str(located), "video")]
    # Only what this dataset has, so that a stray key is not taken for a medium.
    return messages.parse({"conversations": record.get("conversations"), "video": value}, root)


def _config(file: Path, root: Path) -> str:
    """The folder of the configuration that `file` belongs to, relative to `root`; empty where it lies outside."""
    relative = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(root))
    return "" if relative == "." or relative.startswith("..") else relative
