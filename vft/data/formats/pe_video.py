"""PE-Video: WebDataset tars, in each of which a clip is a pair `ID.mp4`, `ID.json` one behind the other; videos may
also have another ending.

The caption is `human_caption`, where people wrote one, else `model_caption`, else `description` (the split `extended`
has none by people). The dataset's card is the source of the layout and of the keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from filelock import FileLock

from vft.common.errors import UserError
from vft.common.files import whole_folder
from vft.common.types import MediaRef, Sample, Turn
from vft.data.file_names import is_stray
from vft.data.formats.records import VIDEO_SUFFIXES, BadRecord, Group, RecordError, check_text, shown
from vft.data.streaming.tar import SUFFIXES, BarrenArchive, DamagedArchive, Run, copied, list_files

MAX_RECORD_BYTES = 16 << 20
UNPACKED_VERSION = 2
"""Raise it when other clips of the same archives are unpacked than before, or their records kept in another form."""
CAPTIONS = ("human_caption", "model_caption", "description")
CARD = frozenset(
    {*CAPTIONS, "category", "category_name", "video_duration_in_s", "fps", "num_frames", "height", "width", "keywords"}
    | {"has_face"}
)
"""Keys that the dataset's card names: of the file and its subject, none of them asks for anything."""
_MEMBER = re.compile(
    rf"((?:.*/)?[^/]+)(?:\.json|{'|'.join(map(re.escape, sorted(VIDEO_SUFFIXES)))})", re.DOTALL | re.IGNORECASE
)
TOGETHER = "the two must stand one behind the other in the archive, under one name; pack them so, or download it again"


def shards(location: str) -> list[str]:
    """The tars at a folder or file, local or `hf://datasets/facebook/PE-Video/train`. UserError where there is none."""
    return list_files(location, SUFFIXES)


def groups(shard: str, place: int, spool: Path, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Group]:
    """The clips of a shard from `place` on, those whose number is `wanted` copied into `spool`, others empty.

    Raises:
        DamagedArchive: after the last clip that can be read.
        BarrenArchive: at the end of a shard that holds none.
    """
    for run in copied(shard, place, spool, _key, wanted, "a video ID.mp4 (or .webm, ...) or its record ID.json"):
        if run.passed_over:
            yield Group(run.place, [], [], ())
        elif run.cut_off and len(run.files) < 2:
            run.remove()  # the other half lies behind the damage, which is no fault of the clip's
        else:
            yield _group(run)


def unpack(location: str, take: str, cache: Path) -> tuple[list[Sample], list[BadRecord]]:
    """The first clips, `take` = `first:N`, unpacked into `cache` once and kept there: what evaluation reads."""
    count = int(take.partition(":")[2])
    where = location if "://" in location else os.path.abspath(location)
    folder = cache / "unpacked" / hashlib.sha256(f"{UNPACKED_VERSION}:{where}:{count}".encode()).hexdigest()[:16]
    with _locked(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                for number, group in enumerate(islice(_all_groups(location, partial), count)):
                    for file in group.files:
                        if file.suffix == ".json":
                            file.unlink()
                        else:  # FFmpeg goes by the content
                            file.rename(partial / f"{number:06d}.mp4")
                    (partial / f"{number:06d}.json").write_text(json.dumps(_kept(group)), encoding="utf-8")
    samples: list[Sample] = []
    bad: list[BadRecord] = []
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_text(encoding="utf-8"))
        bad += [BadRecord(**one) for one in kept["bad"]]
        if kept["record"] is not None:
            video = file.with_suffix(".mp4")
            samples.append(_sample(kept["key"], kept["record"], video, kept["origin"], kept["member"]))
    return samples, bad


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock; another process that unpacks the same is waited for."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); name another data.cache_dir") from error
    try:
        yield
    finally:
        lock.release()


def _all_groups(location: str, spool: Path) -> Iterator[Group]:
    barren: list[str] = []
    archives = shards(location)
    for shard in archives:
        try:
            yield from groups(shard, 0, spool)
        except DamagedArchive as error:
            raise UserError(str(error)) from None
        except BarrenArchive as error:
            barren.append(str(error))
    if len(barren) == len(archives):
        raise UserError(f"{location}: no clip in {len(archives)} archive(s): {barren[0]}")


def _kept(group: Group) -> dict[str, Any]:
    """What `unpack` writes beside a clip."""
    sample = group.samples[0] if group.samples else None
    about: dict[str, Any] = {"bad": [asdict(one) for one in group.bad], "record": None}
    if sample is not None:
        ref = sample.turns[0].parts[0]
        assert isinstance(ref, MediaRef)
        about |= {"key": sample.id, "record": dict(sample.fields), "origin": sample.origin, "member": ref.member}
    return about


def _key(name: str) -> str | None:
    """The clip that a member belongs to: its name without the ending; None of other files, and of hidden ones.

    Two programs may have spelt the accents of one name in two ways, so a pair is told by NFC.
    """
    found = None if is_stray(name) else _MEMBER.fullmatch(name)
    return normalize("NFC", found[1]) if found else None


def _group(run: Run) -> Group:
    by_kind = {os.path.splitext(name)[1].lower() == ".json": name for name in run.files}
    video, about = by_kind.get(False, f"{run.key}.mp4"), by_kind.get(True, f"{run.key}.json")
    files, origin = tuple(run.files.values()), run.title(about if about in run.files else video)
    try:
        if video not in run.files:
            raise RecordError("mp4", f"the clip has no video beside its .json; {TOGETHER}")
        if about not in run.files:
            raise RecordError("json", f"the clip has no .json beside its video; {TOGETHER}")
        if (size := run.files[about].stat().st_size) > MAX_RECORD_BYTES:
            raise RecordError("", f"has {size} bytes, more than {MAX_RECORD_BYTES}; download the archive again")
        try:
            record = json.loads(run.files[about].read_bytes())
        except (ValueError, RecursionError) as error:
            raise RecordError("", f"is not JSON ({str(error)[:60]}); download the archive again") from None
        if not isinstance(record, dict):
            raise RecordError("", f"{shown(record)} is no JSON object; it must be one with a caption")
        sample = _sample(run.key.rpartition("/")[2], record, run.files[video], origin, run.title(video))
        return Group(run.place, [sample], [], files)
    except RecordError as error:
        return Group(run.place, [], [BadRecord(origin, error.field, error.message)], files)


def _sample(key: str, record: Mapping[str, Any], video: Path, origin: str, title: str) -> Sample:
    for name in CAPTIONS:
        if record.get(name) is not None and str(record[name]).strip():
            caption = check_text(record[name], name)
            ref = MediaRef("video", video, field="mp4", member=title)
            turns = (Turn("user", (ref,)), Turn("assistant", (caption,)))
            return Sample(key, turns, origin, record, tuple(one for one in record if one not in CARD))
    found = f"the keys {', '.join(map(shown, record))}" if record else "no keys"
    empty = " (empty here)" if any(name in record for name in CAPTIONS) else ""
    raise RecordError("", f"no caption; the record has {found}, read are {', '.join(CAPTIONS)}{empty}")
