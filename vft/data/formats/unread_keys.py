"""Keys of records that nothing reads: those that name a medium are mistakes, the others are told once for a source."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from vft.common.types import ANSWER_KEYS, MediaRef
from vft.data.formats.media_options import OPTIONS, meaning_of
from vft.data.formats.records import PICTURE_SUFFIXES, VIDEO_SUFFIXES, RecordError, shown

MEDIA_KEYS = ("video", "videos", "image", "images")
VIDEOS = ("video_path", "video_file", "video_file_name", "video_name", "video_url", "videopath", "clip", "clip_path")
IMAGES = (
    "image_path",
    "image_file",
    "image_file_name",
    "image_name",
    "image_url",
    "img",
    "img_path",
    "picture",
    "photo",
)
FILES = ("path", "file", "file_name", "filename", "file_path", "filepath", "media", "media_path")
"""Other names of media in records without turns. One of the last is a picture where its suffix is, else a video."""
AUDIO_SUFFIXES = frozenset({".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".opus", ".wma"})
MAX_NAME = 1024
"""Characters beyond which a text is no file's name."""
MOST_NAMED = 20
"""Keys that are named for one source."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(video|image|audio)/", re.IGNORECASE)


def answer_lists(record: Mapping[str, Any]) -> set[str]:
    """The keys under which a record lists right answers, which tasks read."""
    return {key for key in ANSWER_KEYS if isinstance(record.get(key), list)}


def unread(
    given: Mapping[str, Any], known: Collection[str], refs: Iterable[MediaRef], name: str = "", place: str = ""
) -> list[str]:
    """The keys of `given`, the object at `name` in a record (empty: the record itself), that are not `known`.

    `refs` are the media that were read: a key may name one of these files again, or say beside them where on the web
    they come from. `place` is what `given` is where that holds no media of its own: a message, say.

    Raises:
        RecordError: such a key names another video, picture or sound, or is a misspelt one of `MEDIA_KEYS`.
    """
    refs = tuple(refs)
    files = {path.name for ref in refs for path in ref.files}
    kinds = {ref.kind for ref in refs}
    where = f" in a {place}" if place else ""
    beside = f", beside the {'segments' if place == 'segment' else 'messages'}" if place else ""
    found = []
    for key, value in given.items():
        if key in known or value is None:
            continue
        field = f"{name}.{key}" if name else key
        for kind, file in _files(value):
            if Path(file).name not in files and not (refs and _URL.match(file)):
                advice = "no sound is heard; take the key out"
                if kind != "audio":
                    near = difflib.get_close_matches(key.lower(), (kind, f"{kind}s"), n=1, cutoff=0.0)[0]
                    advice = f"the nearest known one is {near!r}{beside}; rename it, or take it out if it is not shown"
                raise RecordError(field, f"names {shown(file)} under a key that is not read{where}; {advice}")
        meant = _misspelt(key)
        if meant and value and meant.rstrip("s") not in kinds:
            raise RecordError(field, f"is not read{where}; did you mean {meant!r}{beside}?")
        found.append(field)
    return found


_SAYS_WHERE = re.compile(r"video|image|img|frame|clip|media|picture|photo|dir|folder|path|file")
_SAYS_WHICH = re.compile(r"(video|clip|youtube|yt|image|img|picture|photo)[_ -]?id", re.IGNORECASE)


def check_silent(record: Mapping[str, Any], keys: Iterable[str], root: Path) -> None:
    """For records that show nothing: RecordError where one of the `keys` that are not read names a folder of videos or
    pictures below `root`, or is the id of one. What would be trained is the text alone."""
    for key in keys:
        value = record.get(key)
        if _SAYS_WHICH.fullmatch(key) and value not in (None, ""):
            kind = "video" if key[0].lower() in "vcy" else "image"
            told = f"{shown(value)} is an id, and nothing is shown; give the file's path as {kind!r}, or take it out"
            raise RecordError(key, told)
        if not isinstance(value, str) or "\0" in value or not value or not _SAYS_WHERE.search(key.lower()):
            continue
        with suppress(OSError):  # no such folder, mostly
            suffixes = {Path(name).suffix.lower() for name in os.listdir(root / value)}
            if suffixes & (VIDEO_SUFFIXES | PICTURE_SUFFIXES):
                told = f"names the folder {shown(value)} under a key that is not read; the nearest known one is 'video'"
                raise RecordError(key, f"{told}, for the frames of one; rename it, or take it out if it is not shown")


def others(record: Mapping[str, Any], known: Collection[str]) -> tuple[str, ...]:
    """The keys of a record that are neither `known` nor say how its media are shown."""
    return tuple(key for key in record if key not in known and meaning_of(key) is None)


@lru_cache(maxsize=4096)  # records of a source have the same keys
def _misspelt(key: str) -> str:
    """The key of media that is meant; empty where none is, as by `videoID`."""
    near = difflib.get_close_matches(key.lower(), MEDIA_KEYS, n=1, cutoff=0.8)
    return near[0] if near and not key.lower().endswith("id") else ""


def _files(value: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of each media file that a value names, at any depth."""
    if isinstance(value, str):
        kind = _kind_of(value)
        if kind:
            yield kind, value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _files(one)


def _kind_of(text: str) -> str:
    """`video`, `image` or `audio` where a text names such a file or holds one; else empty."""
    if data := _DATA_URL.match(text):
        return data[1].lower()
    if len(text) > MAX_NAME or "\n" in text:
        return ""
    if _URL.match(text):
        text = re.split(r"[?#]", text)[0]
    suffix = Path(text.strip()).suffix.lower()
    kinds = {"video": VIDEO_SUFFIXES, "image": PICTURE_SUFFIXES, "audio": AUDIO_SUFFIXES}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "")


# ------------------------------------------------------------------------------------------------------------ telling


def tell(source: str, records: Sequence[tuple[str, ...]]) -> None:
    """Say once, on one line, which keys of a source's records nobody reads, given for each record that could be used,
    and how many records have them."""
    counts = Counter(key for keys in records for key in keys)
    if counts:
        named = [f"{_named(key)} ({count:,})" for key, count in counts.most_common(MOST_NAMED)]
        more = f" and {len(counts) - MOST_NAMED} more" if len(counts) > MOST_NAMED else ""
        _say(f"{source}: keys that are not read, of {len(records):,} records: {', '.join(named)}{more}")


def tell_new(source: str, origin: str, keys: Iterable[str], told: set[str]) -> None:
    """As `tell`, for records that come one by one: say which of these keys are not yet among the `told`, and add them;
    up to `MOST_NAMED` in all."""
    new = [key for key in keys if key not in told][: max(0, MOST_NAMED - len(told))]
    if new:
        told.update(new)
        _say(f"{source}: keys that are not read, from {origin} on: {', '.join(map(_named, new))}")


@cache
def _say(line: str) -> None:
    """Evaluation may read a source again."""
    print(line, file=sys.stderr, flush=True)


def _named(key: str) -> str:
    """A key, with what it may be meant to be."""
    text = key if key.isprintable() and len(key) <= 60 else shown(key)
    own = key.rpartition(".")[2]
    if meaning_of(own) is not None:
        return f"{text} [no medium there takes it]"
    near = difflib.get_close_matches(own, sorted(OPTIONS["video"]), n=1, cutoff=0.8)
    return f"{text} [did you mean {near[0]}?]" if near and not own.lower().endswith("id") else text
