"""LLaVA-Video-178K: JSON lists of conversations about videos that are in folders of several layouts.

Records have `conversations`, `data_source` and `video`; the video's placeholder is literally `<image>\\n`. The data
set's card is the source of the layout; llava_hound's "videos" are folders of frames. The videos are published as tar.gz
parts whose members are named as `video`: they can be read as a stream, with all JSON files in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.common.unique import unique_name
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Archives, Format, messages
from vft.data.records.files import json_files, parse_json, read_samples
from vft.data.records.paths import PICTURE_SUFFIXES, find_path, is_stray, natural_order, resolve_path
from vft.data.records.preferences import with_preference
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
    """The samples of one JSON file, or of every JSON file in a folder; also pairs of answers."""

    settings = frozenset({"stream"})
    notes_inputs = True

    def files(self, path: Path) -> list[tuple[Path, str]]:
        """As `Format.files`."""
        return json_files(path)

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`."""

        def parse(record: Record, file: Path) -> ParsedRecord:
            if "video" not in record:
                raise RecordError("video", f"is missing; the record has {list_keys(record)}")
            return messages.parse(locate_video(record, file, data.root), data.root)

        files = self.files(find_path(data.root, source.path))
        return read_samples(files, parse, lambda record, _: [with_preference(record)])

    def open_archives(self, location: str) -> Archives:
        """The tar parts in the folder of the records at `location`: a JSON file, or all those in a folder, local or
        `hf://...`."""
        folder, kinds = location, (".json",)
        if location.lower().endswith((".json", ".jsonl")):
            folder, kinds = os.path.dirname(location), (f"/{os.path.basename(location).lower()}",)
        shards = list_files(folder, SUFFIXES)
        records: dict[str, list[Sample]] = defaultdict(list)
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
                    record = with_preference(as_object(value))
                    sample_id = unique_name(record_id(record, f"{Path(name).stem}-{number}"), seen)
                    video = check_text(record.get("video"), "video")
                    records[video].append(Sample(sample_id, (), origin, record, other_keys(record, KNOWN)))
                except RecordError as error:
                    bad.append(error.at(origin))
        if not records and not bad:
            raise UserError(f"{location}: holds no records; name the JSON files that the videos belong to")
        unread = [sample.unread for of_video in records.values() for sample in of_video]
        videos = _ArchivedVideos(records)
        return Archives(shards, videos.clips, digest.hexdigest()[:16], bad, unread, videos.warning(shards))


def locate_video(record: Mapping[str, Any], file: Path, root: Path) -> Record:
    """The record with the path of its video, which may be in the folder of `file`, or in the one that `data_source`
    names below `root`."""
    video = check_text(record["video"], "video")
    path, mode = resolve_path(root, video, "video")
    for folder in filter(None, (_folder_of(file.parent, root), record.get("data_source"))):
        if mode:
            break
        candidate, candidate_mode = resolve_path(root, f"{check_text(folder, 'data_source')}/{video}", "video")
        if candidate_mode:
            path, mode = candidate, candidate_mode
    return {**record, "video": str(path), "data_source": None}


@lru_cache(maxsize=64)  # the records of a file follow each other
def _folder_of(folder: Path, root: Path) -> str:
    """A folder relative to `root`; empty if it is outside, or `root` itself."""
    relative = os.path.relpath(os.path.realpath(folder), os.path.realpath(root))
    return "" if relative == "." or relative.startswith("..") else relative


# ------------------------------------------------------------------------------------------------------- as a stream

PEEKED_MEMBERS = 16
"""Members of an archive whose names are looked at before it is read."""
PEEKED_ARCHIVES = 3
"""Archives that are looked into at the start of a run, to warn at once if no member is named as a record's video."""


class _ArchivedVideos:
    """Reads the videos in archives, each with its records, by which name its file may have."""

    def __init__(self, records: Mapping[str, list[Sample]]) -> None:
        self.records = records
        """By `video`. The samples have no turns yet, and all keys of the records as their fields."""
        self.has_exact_names: dict[str, bool] = {}
        """By archive: whether its members are called exactly as the records' videos."""
        self.taken: dict[str, str] = {}
        """By video: the member that was taken for it although its name has other folders."""

    def clips(self, shard: str, place: int, spool: Path, is_wanted: Callable[[int], bool]) -> Iterator[ArchiveClip]:
        """The videos of a part that have records, as `Archives.clips`.

        Raises:
            DamagedArchive: after the last video that can be read.
            EmptyArchive: at the end of a part without any.
            UserError: two members may both be the video of a record.
        """
        if shard not in self.has_exact_names:
            self.has_exact_names[shard] = _any_of_a_record(_first_names(shard), self._exact)
        video_of = self._exact if self.has_exact_names[shard] else self._likely
        expected = f"the video of a record, such as {next(iter(self.records), '')!r:.200}"
        for clip in copy_clips(shard, place, spool, lambda name: _of_member(name, video_of), is_wanted, expected):
            if not clip.is_skipped:
                is_video = video_of(next(iter(clip.files), "")) == clip.key
                if clip.is_cut_off and not is_video:
                    clip.remove()  # a folder of frames, of which some may be missing
                    continue
                self._read_clip(clip, spool, is_video)
            yield clip

    def warning(self, shards: Sequence[str]) -> str:
        """What to say if the members of the first archives are not named as the records' videos; empty if they are."""
        seen: list[str] = []
        for shard in shards[:PEEKED_ARCHIVES] if self.records else ():
            names = _first_names(shard)
            if _any_of_a_record(names, self._likely):
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

        def named(part: Any) -> Any:
            return replace(part, member=title, is_folder=not is_video) if isinstance(part, MediaRef) else part

        for sample in self.records[clip.key]:
            record = {**sample.fields, "video": files[0] if is_video else files, "data_source": None}
            try:
                parsed = messages.parse(record, spool)
            except RecordError as error:
                clip.bad.append(error.at(sample.origin))
                continue
            turns = tuple(replace(turn, parts=tuple(map(named, turn.parts))) for turn in parsed.turns)
            fields = {key: value for key, value in sample.fields.items() if key not in TURN_KEYS}
            clip.samples.append(replace(sample, turns=turns, fields=fields, unread=parsed.unread))

    # ---------------------------------------------------------------------------- names of members and of videos

    def _exact(self, name: str) -> str | None:
        """The video that a record names so, except for what differs between file systems."""
        return name if name in self.records else self._by_plain_name.get(_plain_name(name))

    def _likely(self, name: str) -> str | None:
        """As `_exact`; else the only video whose name is this one with some folders more or fewer in front.

        UserError if two members would be the same video.
        """
        video = self._exact(name)
        if video is not None or not name:
            return video
        end = f"/{_plain_name(name)}"
        others = self._by_last_part.get(end.rpartition("/")[2], ())
        candidates = [one for one in others if end.endswith(f"/{one}") or f"/{one}".endswith(end)]
        if len(candidates) != 1:
            return None
        video = self._by_plain_name[candidates[0]]
        other = self.taken.setdefault(video, name)
        if other != name:
            raise UserError(
                f"the archives have {other!r} and {name!r}, and both may be the video {video!r} of the records; give "
                "the records the names that the archives have"
            )
        return video

    @cached_property
    def _by_plain_name(self) -> dict[str, str]:
        """Videos by their plain names, without those that share one."""
        counts = Counter(map(_plain_name, self.records))
        return {plain: video for video in self.records if counts[plain := _plain_name(video)] == 1}

    @cached_property
    def _by_last_part(self) -> dict[str, list[str]]:
        """Plain names by their last part."""
        by_last: dict[str, list[str]] = defaultdict(list)
        for plain in self._by_plain_name:
            by_last[plain.rpartition("/")[2]].append(plain)
        return by_last


def _of_member(name: str, video_of: Callable[[str], str | None]) -> str | None:
    """The video that a member is, or of which it is a frame. None if no record asks for it."""
    folder, _, own = name.rpartition("/")
    is_frame = Path(own).suffix.lower() in PICTURE_SUFFIXES and not is_stray(own)
    return video_of(name) or (video_of(folder) if is_frame else None)


def _any_of_a_record(names: Sequence[str], video_of: Callable[[str], str | None]) -> bool:
    return any(_of_member(name, video_of) is not None for name in names)


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
