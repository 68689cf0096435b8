"""LLaVA-Video-178K: JSON lists of conversations about videos that lie in folders of several layouts.

Records hold `conversations`, `data_source` and `video`; the video's placeholder is literally `<image>\\n`. The card of
the dataset is the source of the layout; llava_hound's "videos" are folders of frames. The videos are published as
tar.gz parts whose members are named as `video`: they can be read as a stream, the JSON files being held in memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vft.data.archives import SUFFIXES, Run, copied, list_files, read_bytes
from vft.data.names import is_stray
from vft.data.sources import messages
from vft.data.sources.records import (
    PICTURE_SUFFIXES,
    BadRecord,
    Group,
    Parsed,
    RecordError,
    as_object,
    check_text,
    collect,
    files_below,
    natural_order,
    parse_json,
    resolve_frames,
    resolve_path,
    sample_id_of,
    unique,
)
from vft.data.sources.shapes import TURN_KEYS
from vft.data.sources.unread_keys import others
from vft.types import MediaRef, Sample, Turn

KNOWN = messages.FIELDS | {*TURN_KEYS, "data_source"}


def read(path: Path, root: Path) -> tuple[list[Sample], list[BadRecord]]:
    """The samples of one JSON file, or of every JSON file in a folder, and the records that can't be used.

    Raises:
        UserError: a file as a whole can't be read, or there is none.
    """
    if not path.is_dir():
        return collect([(path, path.name)], lambda record, file: _parse(record, file, root))
    return collect(files_below(path, ".json"), lambda record, file: _parse(record, file, root))


def _parse(record: Mapping[str, Any], file: Path, root: Path) -> Parsed:
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
    return _conversation(record, value, root)


def _conversation(record: Mapping[str, Any], video: Any, root: Path) -> Parsed:
    """`data_source` says where the video lies."""
    parsed = messages.parse({**record, "video": video, "data_source": None}, root)
    return replace(parsed, turns=_changed(parsed.turns, is_folder=True)) if isinstance(video, list) else parsed


def _config(file: Path, root: Path) -> str:
    """The folder of the configuration that `file` belongs to, relative to `root`; empty where it lies outside."""
    relative = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(root))
    return "" if relative == "." or relative.startswith("..") else relative


# ------------------------------------------------------------------------------------------------------- as a stream


@dataclass(frozen=True)
class Archives:
    """The tar parts of a configuration, and its records by the video that they are about."""

    shards: list[str]
    records: dict[str, list[tuple[str, str, Mapping[str, Any]]]]
    """Origin, id and record, by `video`."""
    bad: list[BadRecord]
    """Records that name no video."""
    digest: str
    """Of the JSON files' contents."""
    unread: list[tuple[str, ...]]
    """Keys that are not read, of each record."""

    @staticmethod
    def open(location: str) -> Archives:
        """List the parts at `location`, a folder or `hf://...`, and read the JSON files there. UserError as `read`."""
        shards = list_files(location, SUFFIXES)
        records: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
        bad: list[BadRecord] = []
        seen: dict[str, int] = {}
        digest = hashlib.sha256()
        for file in sorted(list_files(location, (".json",)), key=lambda name: name.split("/")):  # as `read` does
            name = os.path.relpath(file, location)
            content = read_bytes(file)
            digest.update(content)
            for number, (line, record) in enumerate(parse_json(content, file), 1):
                origin = f"{name}:{line}"
                try:
                    record = as_object(record)
                    sample_id = unique(sample_id_of(record, f"{Path(name).stem}-{number}"), seen)
                    video = check_text(record.get("video"), "video")
                    records.setdefault(video, []).append((origin, sample_id, record))
                except RecordError as error:
                    bad.append(BadRecord(origin, error.field, error.message))
        unread = [others(record, KNOWN) for found in records.values() for _, _, record in found]
        return Archives(shards, records, bad, digest.hexdigest()[:16], unread)

    def groups(self, shard: str, place: int, spool: Path, wanted: Callable[[int], bool]) -> Iterator[Group]:
        """The videos of a part from `place` on that have records, each with all of these.

        Those whose number is `wanted` are copied into `spool`, others are empty.

        Raises:
            DamagedArchive: after the last video that can be read.
        """
        for run in copied(shard, place, spool, self._video_of, wanted):
            if run.passed_over:
                yield Group(run.place, [], [], ())
            elif run.cut_off and run.key not in run.files:
                run.remove()  # a folder of frames, perhaps not all of them
            else:
                yield self._group(run, spool)

    def _video_of(self, name: str) -> str | None:
        """The video that a member is, or is a frame of; None where no record asks for it."""
        if name in self.records:
            return name
        folder = name.rpartition("/")[0]
        is_frame = Path(name).suffix.lower() in PICTURE_SUFFIXES and not is_stray(Path(name).name)
        return folder if folder in self.records and is_frame else None

    def _group(self, run: Run, spool: Path) -> Group:
        frames = [str(run.files[name]) for name in natural_order(run.files)]
        value: Any = str(run.files[run.key]) if run.key in run.files else frames
        title = run.title(next(iter(run.files)))
        samples: list[Sample] = []
        bad: list[BadRecord] = []
        for origin, sample_id, record in self.records[run.key]:
            try:
                parsed = _conversation(record, value, spool)
                turns = _changed(parsed.turns, member=title)
                samples.append(Sample(sample_id, turns, origin, _fields(record), parsed.unread))
            except RecordError as error:
                bad.append(BadRecord(origin, error.field, error.message))
        return Group(run.place, samples, bad, tuple(run.files.values()))


def _changed(turns: Sequence[Turn], **changes: Any) -> tuple[Turn, ...]:
    """The turns with other fields of their media."""
    parts = ((replace(p, **changes) if isinstance(p, MediaRef) else p for p in turn.parts) for turn in turns)
    return tuple(replace(turn, parts=tuple(own)) for turn, own in zip(turns, parts, strict=True))


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "conversations"}
