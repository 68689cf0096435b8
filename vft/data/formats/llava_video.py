"""LLaVA-Video-178K: JSON lists of conversations about videos that lie in folders of several layouts.

Records hold `conversations`, `data_source` and `video`; the video's placeholder is literally `<image>\\n`. The card of
the dataset is the source of the layout; llava_hound's "videos" are folders of frames. The videos are published as
tar.gz parts whose members are named as `video`: they can be read as a stream, the JSON files being held in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample, Turn
from vft.data.file_names import is_stray
from vft.data.formats import messages
from vft.data.formats.records import (
    PICTURE_SUFFIXES,
    TURN_KEYS,
    BadRecord,
    Group,
    Parsed,
    RecordError,
    as_object,
    check_text,
    collect,
    files_below,
    names_in,
    natural_order,
    parse_json,
    resolve_path,
    sample_id_of,
    unique,
)
from vft.data.formats.unread_keys import others
from vft.data.streaming.tar import SUFFIXES, DamagedArchive, Run, copied, list_files, members, read_bytes

KNOWN = messages.FIELDS | {*TURN_KEYS, "data_source"}


def read(path: Path, root: Path) -> tuple[list[Sample], list[BadRecord]]:
    """The samples of one JSON file, or of every JSON file in a folder, and the records that can't be used.

    Raises:
        UserError: a file as a whole can't be read, or there is none.
    """
    files = files_below(path, ".json") if path.is_dir() else [(path, path.name)]
    return collect(files, lambda record, file: _parse(record, file, root))


def _parse(record: Mapping[str, Any], file: Path, root: Path) -> Parsed:
    if "video" not in record:
        raise RecordError("video", f"is missing; the record has {names_in(record)}")
    return messages.parse(located(record, file, root), root)


def located(record: Mapping[str, Any], file: Path, root: Path) -> dict[str, Any]:
    """The record with the path of its video, which may lie in the folder of `file` or in that which `data_source` names
    below `root`."""
    video = check_text(record["video"], "video")
    found, mode = resolve_path(root, video, "video")
    for folder in filter(None, (_config(file, root), record.get("data_source"))):
        if mode:
            break
        candidate, found_mode = resolve_path(root, f"{check_text(folder, 'data_source')}/{video}", "video")
        if found_mode:
            found, mode = candidate, found_mode
    return {**record, "video": str(found), "data_source": None}


def _conversation(record: Mapping[str, Any], video: Any, root: Path) -> Parsed:
    """Of a stream: the video is a copy, a file or the frames of a folder."""
    parsed = messages.parse({**record, "video": video, "data_source": None}, root)
    return replace(parsed, turns=_changed(parsed.turns, is_folder=True)) if isinstance(video, list) else parsed


def _config(file: Path, root: Path) -> str:
    """The folder of the configuration that `file` belongs to, relative to `root`; empty where it lies outside."""
    relative = os.path.relpath(os.path.realpath(file.parent), os.path.realpath(root))
    return "" if relative == "." or relative.startswith("..") else relative


# ------------------------------------------------------------------------------------------------------- as a stream

PEEK = 16
"""Members of an archive whose names are looked at before it is read."""
PEEKED_ARCHIVES = 3
"""Archives that are looked into at the start of a run: members of other names than the records' are told at once."""


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
    namings: dict[str, Callable[[str], str | None]] = field(default_factory=dict)
    """By archive: the video that a name of a member stands for."""

    @staticmethod
    def open(location: str) -> Archives:
        """Read the records at `location`, a JSON file or all those in a folder, local or `hf://...`, and list the tar
        parts in that folder. UserError as `read`."""
        folder, kinds = location, (".json",)
        if location.lower().endswith((".json", ".jsonl")):
            folder, kinds = os.path.dirname(location), (f"/{os.path.basename(location).lower()}",)
        shards = list_files(folder, SUFFIXES)
        records: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {}
        bad: list[BadRecord] = []
        seen: dict[str, int] = {}
        digest = hashlib.sha256()
        # In the order that `read` has.
        for file in sorted(list_files(location, kinds), key=lambda name: name.split("/")):
            name = os.path.relpath(file, folder)
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
        if not records and not bad:
            raise UserError(f"{location}: holds no records; name the JSON files that the videos belong to")
        unread = [others(record, KNOWN) for found in records.values() for _, _, record in found]
        return Archives(shards, records, bad, digest.hexdigest()[:16], unread)

    def groups(self, shard: str, place: int, spool: Path, wanted: Callable[[int], bool]) -> Iterator[Group]:
        """The videos of a part from `place` on that have records, each with all of these.

        Those whose number is `wanted` are copied into `spool`, others are empty.

        Raises:
            DamagedArchive: after the last video that can be read.
            BarrenArchive: at the end of a part without any.
            UserError: two members may both be the video of a record.
        """
        if shard not in self.namings:
            self.namings[shard] = self._video_of if self._match(_first_names(shard), self._video_of) else self._likely
        naming = self.namings[shard]
        expected = f"the video of a record, such as {next(iter(self.records), '')!r:.200}"
        for run in copied(shard, place, spool, lambda name: self._of_member(name, naming), wanted, expected):
            if run.passed_over:
                yield Group(run.place, [], [], ())
                continue
            is_video = naming(next(iter(run.files), "")) == run.key
            if run.cut_off and not is_video:
                run.remove()  # a folder of frames, perhaps not all of them
            else:
                yield self._group(run, spool, is_video)

    def misnamed(self) -> str:
        """What to tell where the names of the first archives' members are not those of records; empty: they are."""
        if not self.records:
            return ""
        seen: list[str] = []
        for shard in self.shards[:PEEKED_ARCHIVES]:
            names = _first_names(shard)
            if self._match(names, self._likely):
                return ""
            seen += (f"{shard} has {name!r:.200}" for name in names)
        if not seen:
            return ""
        record = f"the records have {next(iter(self.records))!r:.200}"
        return f"none of the first {len(seen)} members of the archives is the video of a record: {seen[0]}, {record}"

    def _of_member(self, name: str, naming: Callable[[str], str | None]) -> str | None:
        """The video that a member is, or is a frame of; None where no record asks for it."""
        return naming(name) or (naming(name.rpartition("/")[0]) if _is_picture(name) else None)

    def _match(self, names: Iterable[str], naming: Callable[[str], str | None]) -> bool:
        return any(self._of_member(name, naming) is not None for name in names)

    def _video_of(self, name: str) -> str | None:
        """The video that a record names so, but for what differs between file systems."""
        return name if name in self.records else self._plain.get(_plain_name(name))

    def _likely(self, name: str) -> str | None:
        """As `_video_of`; else the only one whose name is this one with some folders more or less before it."""
        found = self._video_of(name)
        if found is not None or not name:
            return found
        parts = _plain_name(name).split("/")
        fitting = []
        for plain in self._by_last.get(parts[-1], ()):
            others = plain.split("/")
            shared = min(len(parts), len(others))
            if parts[-shared:] == others[-shared:]:
                fitting.append(self._plain[plain])
        if len(fitting) != 1:
            return None
        other = self._claims.setdefault(fitting[0], name)
        if other != name:
            raise UserError(
                f"the archives have {other!r} and {name!r}, and both may be the video {fitting[0]!r} of the records; "
                "give the records the names that the archives have"
            )
        return fitting[0]

    @cached_property
    def _plain(self) -> dict[str, str]:
        """The videos by their plain names, those without that share one with another."""
        counts = Counter(map(_plain_name, self.records))
        return {plain: video for video in self.records if counts[plain := _plain_name(video)] == 1}

    @cached_property
    def _by_last(self) -> dict[str, list[str]]:
        """Plain names by their last part."""
        found: dict[str, list[str]] = {}
        for plain in self._plain:
            found.setdefault(plain.rpartition("/")[2], []).append(plain)
        return found

    @cached_property
    def _claims(self) -> dict[str, str]:
        """By video: the member that was taken for it though its name has other folders."""
        return {}

    def _group(self, run: Run, spool: Path, is_video: bool) -> Group:
        frames = [str(run.files[name]) for name in natural_order(run.files)]
        value: Any = frames[0] if is_video else frames
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


def _first_names(shard: str) -> list[str]:
    """Names of the first members of an archive, as far as it can be read."""
    names: list[str] = []
    with suppress(DamagedArchive):
        for member in islice((one for one in members(shard) if not is_stray(one.name)), PEEK):
            names.append(member.name)
    return names


def _plain_name(name: str) -> str:
    """A name without what differs between file systems and archivers: accents as NFC, the ending's case, `./`."""
    path, suffix = os.path.splitext(normalize("NFC", name).replace("\\", "/"))
    return "/".join(part for part in f"{path}{suffix.lower()}".split("/") if part not in ("", "."))


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURE_SUFFIXES and not is_stray(Path(name).name)


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "conversations"}
