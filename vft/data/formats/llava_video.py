"""LLaVA-Video-178K: JSON lists of conversations about videos that are in folders of several layouts.

Records have `conversations`, `data_source` and `video`; the video's placeholder is literally `<image>\\n`. The data
set's card is the source of the layout; llava_hound's "videos" are folders of frames. The videos are published as tar.gz
parts whose members are named as `video`: they can be read as a stream, with all JSON files in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample, Turn
from vft.common.unique import unique_name
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Archives, Format, messages
from vft.data.records.files import json_files, parse_json, read_samples
from vft.data.records.paths import PICTURE_SUFFIXES, find_path, is_stray, natural_order, resolve_path
from vft.data.records.record import (
    TURN_KEYS,
    BadRecord,
    ParsedRecord,
    Record,
    RecordError,
    Records,
    as_object,
    check_text,
    list_keys,
    record_id,
)
from vft.data.records.unread_keys import other_keys
from vft.data.streaming.archives import (
    SUFFIXES,
    ArchiveClip,
    DamagedArchive,
    copy_clips,
    list_files,
    members,
    read_bytes,
)

KNOWN = messages.FIELDS | {*TURN_KEYS, "data_source"}


class LlavaVideo(Format):
    """The samples of one JSON file, or of every JSON file in a folder."""

    settings = frozenset({"stream"})

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`."""

        def parse(record: Record, file: Path) -> ParsedRecord:
            if "video" not in record:
                raise RecordError("video", f"is missing; the record has {list_keys(record)}")
            return messages.parse(locate_video(record, file, data.root), data.root)

        return read_samples(json_files(find_path(data.root, source.path)), parse)

    def open_archives(self, location: str) -> Archives:
        """The tar parts in the folder of the records at `location`: a JSON file, or all those in a folder, local or
        `hf://...`."""
        return _open(location)


def locate_video(record: Mapping[str, Any], file: Path, root: Path) -> Record:
    """The record with the path of its video, which may be in the folder of `file`, or in the one that `data_source`
    names below `root`."""
    video = check_text(record["video"], "video")
    path, mode = resolve_path(root, video, "video")
    for folder in filter(None, (_folder_of(file, root), record.get("data_source"))):
        if mode:
            break
        candidate, candidate_mode = resolve_path(root, f"{check_text(folder, 'data_source')}/{video}", "video")
        if candidate_mode:
            path, mode = candidate, candidate_mode
    return {**record, "video": str(path), "data_source": None}


def _folder_of(file: Path, root: Path) -> str:
    """The folder of a file, relative to `root`; empty if it is outside, or `root` itself."""
    relative = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(root))
    return "" if relative == "." or relative.startswith("..") else relative


# ------------------------------------------------------------------------------------------------------- as a stream

PEEKED_MEMBERS = 16
"""Members of an archive whose names are looked at before it is read."""
PEEKED_ARCHIVES = 3
"""Archives that are looked into at the start of a run, to warn at once if no member is named as a record's video."""


class _ArchivedRecord(NamedTuple):
    """A record about a video in an archive."""

    origin: str
    id: str
    content: Record


def _open(location: str) -> Archives:
    """Read all records, and list the tar parts beside them."""
    folder, kinds = location, (".json",)
    if location.lower().endswith((".json", ".jsonl")):
        folder, kinds = os.path.dirname(location), (f"/{os.path.basename(location).lower()}",)
    shards = list_files(folder, SUFFIXES)
    records: dict[str, list[_ArchivedRecord]] = defaultdict(list)
    bad: list[BadRecord] = []
    seen: dict[str, int] = {}
    digest = hashlib.sha256()
    # In the same order as `json_files`.
    for file in sorted(list_files(location, kinds), key=lambda name: name.split("/")):
        name = os.path.relpath(file, folder)
        content = read_bytes(file)
        digest.update(content)
        for number, (line, value) in enumerate(parse_json(content, file), 1):
            origin = f"{name}:{line}"
            try:
                record = as_object(value)
                sample_id = unique_name(record_id(record, f"{Path(name).stem}-{number}"), seen)
                video = check_text(record.get("video"), "video")
                records[video].append(_ArchivedRecord(origin, sample_id, record))
            except RecordError as error:
                bad.append(error.at(origin))
    if not records and not bad:
        raise UserError(f"{location}: holds no records; name the JSON files that the videos belong to")
    unread = [other_keys(record.content, KNOWN) for of_video in records.values() for record in of_video]
    reader = _ArchiveReader(records)
    return Archives(shards, reader.clips, digest.hexdigest()[:16], bad, unread, reader.warning(shards))


class _ArchiveReader:
    """Reads the videos in archives, each with its records."""

    def __init__(self, records: Mapping[str, list[_ArchivedRecord]]) -> None:
        self.records = records
        """By `video`."""
        self.names = _VideoNames(records)
        self.has_exact_names: dict[str, bool] = {}
        """By archive: whether its members are called exactly as the records' videos."""

    def clips(self, shard: str, place: int, spool: Path, is_wanted: Callable[[int], bool]) -> Iterator[ArchiveClip]:
        """The videos of a part that have records, as `Archives.clips`.

        Raises:
            DamagedArchive: after the last video that can be read.
            EmptyArchive: at the end of a part without any.
            UserError: two members may both be the video of a record.
        """
        if shard not in self.has_exact_names:
            names = _first_names(shard)
            self.has_exact_names[shard] = any(_of_member(name, self.names.exact) is not None for name in names)
        video_of = self.names.exact if self.has_exact_names[shard] else self.names.likely
        expected = f"the video of a record, such as {next(iter(self.records), '')!r:.200}"
        for clip in copy_clips(shard, place, spool, lambda name: _of_member(name, video_of), is_wanted, expected):
            is_video = video_of(next(iter(clip.files), "")) == clip.key
            if clip.is_cut_off and not clip.is_skipped and not is_video:
                clip.remove()  # a folder of frames, of which some may be missing
                continue
            if not clip.is_skipped:
                self._read_clip(clip, spool, is_video)
            yield clip

    def warning(self, shards: Sequence[str]) -> str:
        """What to say if the members of the first archives are not named as the records' videos; empty if they are."""
        seen: list[str] = []
        for shard in shards[:PEEKED_ARCHIVES] if self.records else ():
            names = _first_names(shard)
            if any(_of_member(name, self.names.likely) is not None for name in names):
                return ""
            seen += (f"{shard} has {name!r:.200}" for name in names)
        if not seen:
            return ""
        record = f"the records have {next(iter(self.records))!r:.200}"
        return f"none of the first {len(seen)} members of the archives is the video of a record: {seen[0]}, {record}"

    def _read_clip(self, clip: ArchiveClip, spool: Path, is_video: bool) -> None:
        """Add the samples about a video, a file or a folder of frames."""
        files = [str(clip.files[name]) for name in natural_order(clip.files)]
        title = clip.title(next(iter(clip.files)))
        for origin, sample_id, record in self.records[clip.key]:
            try:
                video = files[0] if is_video else files
                parsed = messages.parse({**record, "video": video, "data_source": None}, spool)
            except RecordError as error:
                clip.bad.append(error.at(origin))
                continue
            turns = _with_media(parsed.turns, member=title, is_folder=not is_video)
            fields = {key: value for key, value in record.items() if key != "conversations"}
            clip.samples.append(Sample(sample_id, turns, origin, fields, parsed.unread))


class _VideoNames:
    """Finds the video of a record that a file in an archive is."""

    def __init__(self, videos: Collection[str]) -> None:
        self.videos = videos
        self.taken: dict[str, str] = {}
        """By video: the member that was taken for it although its name has other folders."""

    def exact(self, name: str) -> str | None:
        """The video that a record names so, except for what differs between file systems."""
        return name if name in self.videos else self._by_plain_name.get(_plain_name(name))

    def likely(self, name: str) -> str | None:
        """As `exact`; else the only video whose name is this one with some folders more or fewer in front.

        UserError if two members would be the same video.
        """
        video = self.exact(name)
        if video is not None or not name:
            return video
        parts = _plain_name(name).split("/")
        candidates = []
        for plain in self._by_last_part.get(parts[-1], ()):
            others = plain.split("/")
            shared = min(len(parts), len(others))
            if parts[-shared:] == others[-shared:]:
                candidates.append(self._by_plain_name[plain])
        if len(candidates) != 1:
            return None
        other = self.taken.setdefault(candidates[0], name)
        if other != name:
            raise UserError(
                f"the archives have {other!r} and {name!r}, and both may be the video {candidates[0]!r} of the "
                "records; give the records the names that the archives have"
            )
        return candidates[0]

    @cached_property
    def _by_plain_name(self) -> dict[str, str]:
        """Videos by their plain names, without those that share one."""
        counts = Counter(map(_plain_name, self.videos))
        return {plain: video for video in self.videos if counts[plain := _plain_name(video)] == 1}

    @cached_property
    def _by_last_part(self) -> dict[str, list[str]]:
        """Plain names by their last part."""
        by_last: dict[str, list[str]] = defaultdict(list)
        for plain in self._by_plain_name:
            by_last[plain.rpartition("/")[2]].append(plain)
        return by_last


def _of_member(name: str, video_of: Callable[[str], str | None]) -> str | None:
    """The video that a member is, or of which it is a frame. None if no record asks for it."""
    return video_of(name) or (video_of(name.rpartition("/")[0]) if _is_picture(name) else None)


def _with_media(turns: Iterable[Turn], **changes: Any) -> tuple[Turn, ...]:
    """The turns with other fields of their media."""
    return tuple(
        replace(turn, parts=tuple(replace(p, **changes) if isinstance(p, MediaRef) else p for p in turn.parts))
        for turn in turns
    )


def _first_names(shard: str) -> list[str]:
    """Names of the first members of an archive, as far as it can be read."""
    names: list[str] = []
    with suppress(DamagedArchive):
        for member in islice((one for one in members(shard) if not is_stray(one.name)), PEEKED_MEMBERS):
            names.append(member.name)
    return names


def _plain_name(name: str) -> str:
    """A name without what differs between file systems and archivers: accents in NFC, the suffix in lower case, no
    `./`."""
    path, suffix = os.path.splitext(normalize("NFC", name).replace("\\", "/"))
    return "/".join(part for part in f"{path}{suffix.lower()}".split("/") if part not in ("", "."))


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURE_SUFFIXES and not is_stray(Path(name).name)
