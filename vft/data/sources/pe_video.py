"""PE-Video: WebDataset tars, in each of which a clip is a pair `ID.mp4`, `ID.json` one behind the other.

The caption is `human_caption`, where people wrote one, else `model_caption`, else `description` (the split `extended`
has none by people). The dataset's card is the source of the layout and of the keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from vft.data.archives import SUFFIXES, DamagedArchive, Member, list_files, members
from vft.data.sources.records import BadRecord, Group, RecordError, check_text, shown
from vft.files import whole_folder
from vft.types import MediaRef, Sample, Turn, UserError

CAPTIONS = ("human_caption", "model_caption", "description")


def shards(location: str) -> list[str]:
    """The tars at a folder or file, local or `hf://datasets/facebook/PE-Video/train`. UserError where there is none."""
    return list_files(location, SUFFIXES)


def groups(shard: str, place: int, spool: Path) -> Iterator[Group]:
    """The clips of a shard from `place` on, each copied into `spool`.

    Raises:
        DamagedArchive: after the last clip that can be read.
    """
    for key, pair in groupby(members(shard, place), key=_key):
        yield _group(key, pair, spool)


def unpack(location: str, take: str, cache: Path) -> tuple[list[Sample], list[BadRecord]]:
    """The first clips, `take` = `first:N`, unpacked into `cache` once and kept there: what evaluation reads."""
    count = int(take.partition(":")[2])
    name = hashlib.sha256(f"{location}:{count}".encode()).hexdigest()[:16]
    folder = cache / "unpacked" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                for number, group in enumerate(islice(_all_groups(location, partial), count)):
                    for file in group.files:
                        file.rename(partial / f"{number:06d}{file.suffix}")
                    (partial / f"{number:06d}.json").write_text(json.dumps(_kept(group)), encoding="utf-8")
    samples: list[Sample] = []
    bad: list[BadRecord] = []
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        bad += [BadRecord(**one) for one in kept["bad"]]
        video = next((path for path in folder.glob(f"{file.stem}.*") if path.suffix != ".json"), None)
        if kept["record"] is not None and video is not None:
            samples.append(_sample(kept["key"], kept["record"], video, kept["origin"], kept["member"]))
    return samples, bad


def _all_groups(location: str, spool: Path) -> Iterator[Group]:
    for shard in shards(location):
        try:
            yield from groups(shard, 0, spool)
        except DamagedArchive as error:
            raise UserError(str(error)) from None


def _kept(group: Group) -> dict[str, Any]:
    """What `unpack` writes beside a clip."""
    sample = group.samples[0] if group.samples else None
    about: dict[str, Any] = {"bad": [asdict(one) for one in group.bad], "record": None}
    if sample is not None:
        ref = sample.turns[0].parts[0]
        assert isinstance(ref, MediaRef)
        about |= {"key": sample.id, "record": dict(sample.fields), "origin": sample.origin, "member": ref.member}
    return about


def _key(member: Member) -> str:
    """WebDataset's rule: the name up to the first dot of its last part."""
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}" if folder else name.partition(".")[0]


def _group(key: str, pair: Iterator[Member], spool: Path) -> Group:
    place, title, origin = -1, "", ""
    record: Any = None
    video: Path | None = None
    bad: list[BadRecord] = []
    for member in pair:
        place = member.place if place < 0 else place
        origin = origin or member.title
        if member.name.endswith(".json"):
            origin = member.title
            try:
                record = json.loads(member.file.read())
            except (ValueError, RecursionError) as error:
                bad.append(BadRecord(origin, "", f"is not JSON ({str(error)[:60]}); download the archive again"))
        elif member.name.endswith(".mp4") and video is None:
            title, video = member.title, member.save(spool)
    files = () if video is None else (video,)
    if not bad:
        try:
            if video is None:
                raise RecordError("mp4", "the clip has no .mp4 beside its .json; download the archive again")
            if not isinstance(record, dict):
                raise RecordError("json", f"{shown(record)}: the clip has no .json object beside its .mp4")
            sample = _sample(key.rpartition("/")[2], record, video, origin, title)
            return Group(place, [sample], [], files)
        except RecordError as error:
            bad.append(BadRecord(origin, error.field, error.message))
    return Group(place, [], bad, files)


def _sample(key: str, record: Mapping[str, Any], video: Path, origin: str, title: str) -> Sample:
    for name in CAPTIONS:
        if record.get(name) not in (None, ""):
            caption = check_text(record[name], name)
            ref = MediaRef("video", video, field="mp4", member=title)
            return Sample(key, (Turn("user", (ref,)), Turn("assistant", (caption,))), origin, record)
    found = ", ".join(map(shown, record)) or "no fields"
    raise RecordError(CAPTIONS[0], f"the record has no caption under {', '.join(CAPTIONS)}; it has {found}")
