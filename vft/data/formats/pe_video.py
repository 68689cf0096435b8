"""PE-Video: WebDataset tars in which each clip is a pair `ID.mp4`, `ID.json`, one after the other; videos may also have
another suffix.

The caption is `human_caption` if people wrote one, else `model_caption`, else `description` (the split `extended` has
none by people). A `rejected_response` beside it, which the data set has not, makes it the chosen answer of a pair. The
data set's card is the source of the layout and of the other keys.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from unicodedata import normalize

from vft.common.errors import UserError
from vft.common.files import digest, locked, whole_folder
from vft.common.types import MediaRef, Sample, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Archives, Format, locate
from vft.data.records.paths import VIDEO_SUFFIXES, is_stray
from vft.data.records.preferences import REJECTED, check_answers
from vft.data.records.record import BadRecord, RecordError, Records, check_text, list_keys, short_repr
from vft.data.streaming.archives import SUFFIXES, ArchiveClip, DamagedArchive, EmptyArchive, copy_clips, list_files

MAX_RECORD_BYTES = 16 << 20
ANOTHER_CACHE = "name another data.cache_dir"
UNPACKED_VERSION = 3
"""Raise it when other clips of the same archives are unpacked than before, or their records kept in another form."""
CAPTIONS = ("human_caption", "model_caption", "description")
CARD = frozenset(
    {*CAPTIONS, "category", "category_name", "video_duration_in_s", "fps", "num_frames", "height", "width", "keywords"}
    | {"has_face"}
)
"""Keys that the data set's card names. They describe the file and its subject; none of them changes the sample."""
_MEMBER = re.compile(
    rf"((?:.*/)?[^/]+)(?:\.json|{'|'.join(map(re.escape, sorted(VIDEO_SUFFIXES)))})", re.DOTALL | re.IGNORECASE
)
TOGETHER = "the two must stand one behind the other in the archive, under one name; pack them so, or download it again"


class PEVideo(Format):
    """Clips with captions, read as a stream; or the first N, unpacked into the cache once, for evaluation."""

    settings = frozenset({"stream"})

    def check(self, source: SourceConfig) -> None:
        """ValueError if the clips are neither streamed nor counted."""
        if not source.stream and not source.take.startswith("first"):
            raise ValueError(
                'format = "pe_video" needs stream = true, or take = "first:N" to unpack N clips into the cache'
            )

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`."""
        count = int(source.take.partition(":")[2])
        folder = _unpack(locate(source.path, data.root), count, data.cache_path)
        samples: list[Sample] = []
        bad: list[BadRecord] = []
        for about in json.loads((folder / "clips.json").read_text(encoding="utf-8")):
            files = {name: folder / file for name, file in about["files"].items()}
            clip = ArchiveClip(about["archive"], about["key"], 0, files=files)
            _read_clip(clip)
            samples += clip.samples
            bad += clip.bad
        return samples, bad

    def open_archives(self, location: str) -> Archives:
        """The tars at a folder, file or `hf://datasets/facebook/PE-Video/train`."""
        return Archives(list_files(location, SUFFIXES), read_clips)


def read_clips(
    shard: str, place: int, spool: Path, is_wanted: Callable[[int], bool] = lambda number: True
) -> Iterator[ArchiveClip]:
    """The clips of a shard, as `Archives.clips`.

    Raises:
        DamagedArchive: after the last clip that can be read.
        EmptyArchive: at the end of a shard without clips.
    """
    expected = "a video ID.mp4 (or .webm, ...) or its record ID.json"
    for clip in copy_clips(shard, place, spool, _key, is_wanted, expected):
        if clip.is_cut_off and len(clip.files) < 2:
            clip.remove()  # its other half is behind the damage; the clip itself is not bad
            continue
        if not clip.is_skipped:
            _read_clip(clip)
        yield clip


def _key(name: str) -> str | None:
    """The clip to which a member belongs: its name without the suffix. None for other files, and for hidden ones.

    In NFC, since two programs may have written the accents of one name in two ways.
    """
    match = None if is_stray(name) else _MEMBER.fullmatch(name)
    return normalize("NFC", match[1]) if match else None


def _read_clip(clip: ArchiveClip) -> None:
    """Add the sample of a clip, or its bad record."""
    by_kind = {os.path.splitext(name)[1].lower() == ".json": name for name in clip.files}
    video, about = by_kind.get(False, f"{clip.key}.mp4"), by_kind.get(True, f"{clip.key}.json")
    origin = clip.title(about if about in clip.files else video)
    try:
        if video not in clip.files:
            raise RecordError("mp4", f"the clip has no video beside its .json; {TOGETHER}")
        if about not in clip.files:
            raise RecordError("json", f"the clip has no .json beside its video; {TOGETHER}")
        if (size := clip.files[about].stat().st_size) > MAX_RECORD_BYTES:
            raise RecordError("", f"has {size} bytes, more than {MAX_RECORD_BYTES}; download the archive again")
        try:
            record = json.loads(clip.files[about].read_bytes())
        except (ValueError, RecursionError) as error:
            raise RecordError("", f"is not JSON ({str(error)[:60]}); download the archive again") from None
        if not isinstance(record, dict):
            raise RecordError("", f"{short_repr(record)} is no JSON object; it must be one with a caption")
        captions = [name for name in CAPTIONS if record.get(name) is not None and str(record[name]).strip()]
        if not captions:
            keys = f"the keys {list_keys(record)}" if record else "no keys"
            empty = " (empty here)" if any(name in record for name in CAPTIONS) else ""
            raise RecordError("", f"no caption; the record has {keys}, read are {', '.join(CAPTIONS)}{empty}")
        caption = check_text(record[captions[0]], captions[0])
        if record.get(REJECTED) is not None:
            check_answers((captions[0], REJECTED), caption, check_text(record[REJECTED], REJECTED))
        ref = MediaRef("video", clip.files[video], field="mp4", member=clip.title(video))
        turns = (Turn("user", (ref,)), Turn("assistant", (caption,)))
        unread = tuple(name for name in record if name not in {*CARD, REJECTED})
        clip.samples.append(Sample(clip.key.rpartition("/")[2], turns, origin, record, unread))
    except RecordError as error:
        clip.bad.append(error.at(origin))


# --------------------------------------------------------------------------------------------------- the first clips


def _unpack(location: str, count: int, cache: Path) -> Path:
    """Unpack the first `count` clips into a folder of the cache, unless they are there already; that folder."""
    where = location if "://" in location else os.path.abspath(location)
    folder = cache / "unpacked" / digest(f"{UNPACKED_VERSION}:{where}:{count}")
    with locked(folder.with_suffix(".lock"), "another process that unpacks the same clips", ANOTHER_CACHE):
        if not folder.is_dir():
            with whole_folder(folder) as partial:
                clips = []
                for number, clip in enumerate(islice(_all_clips(location, partial), count)):
                    files = {}
                    for name, file in clip.files.items():  # FFmpeg looks at a video's content, not at its suffix
                        files[name] = f"{number:06d}{'.json' if file.suffix == '.json' else '.mp4'}"
                        file.rename(partial / files[name])
                    clips.append({"archive": clip.archive, "key": clip.key, "files": files})
                (partial / "clips.json").write_text(json.dumps(clips), encoding="utf-8")
    return folder


def _all_clips(location: str, spool: Path) -> Iterator[ArchiveClip]:
    empty: list[str] = []
    shards = list_files(location, SUFFIXES)
    for shard in shards:
        try:
            yield from read_clips(shard, 0, spool)
        except DamagedArchive as error:
            raise UserError(str(error)) from None
        except EmptyArchive as error:
            empty.append(str(error))
    if len(empty) == len(shards):
        raise UserError(f"{location}: no clip in {len(shards)} archive(s): {empty[0]}")
