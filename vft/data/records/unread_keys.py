"""Keys of records that no format reads: one that names a medium is a mistake, the others are reported once a source."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from vft.common.types import ANSWER_KEYS, MediaRef
from vft.data.records.inputs import note
from vft.data.records.media_options import OPTIONS, key_meaning
from vft.data.records.paths import PICTURE_SUFFIXES, VIDEO_SUFFIXES
from vft.data.records.record import RecordError, short_repr

logger = logging.getLogger(__name__)

MEDIA_KEYS = ("video", "videos", "image", "images")
VIDEOS = ("video_path", "video_file", "video_file_name", "video_name", "video_url", "videopath", "clip", "clip_path")
IMAGES = (
    *("image_path", "image_file", "image_file_name", "image_name", "image_url"),
    *("img", "img_path", "picture", "photo"),
)
FILES = ("path", "file", "file_name", "filename", "file_path", "filepath", "media", "media_path")
"""Other names of media in records without turns. A key of the last row is a picture if its suffix is a picture's."""
AUDIO_SUFFIXES = frozenset({".wav", ".mp3", ".flac", ".m4a", ".aac", ".ogg", ".opus", ".wma"})
MAX_NAME_CHARACTERS = 1024
"""A longer text is not a file's name."""
MAX_REPORTED_KEYS = 20
"""Keys that are reported for one source."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA_URL = re.compile(r"data:(video|image|audio)/", re.IGNORECASE)
_SAYS_WHERE = re.compile(r"video|image|img|frame|clip|media|picture|photo|dir|folder|path|file")
_SAYS_WHICH = re.compile(r"(video|clip|youtube|yt|image|img|picture|photo)[_ -]?id", re.IGNORECASE)


def answer_lists(record: Mapping[str, Any]) -> set[str]:
    """The keys under which a record lists right answers; tasks read them."""
    return {key for key in ANSWER_KEYS if isinstance(record.get(key), list)}


def find_unread_keys(
    given: Mapping[str, Any], known: Collection[str], refs: Iterable[MediaRef], name: str = "", place: str = ""
) -> list[str]:
    """The keys of an object in a record that are not `known`, such as `messages[].key` of the object `messages[2]`.

    Args:
        given: The object, called `name` in the record; empty for the record itself.
        refs: Media that were read. A key may name one of their files again, or say where on the web they are from.
        place: What the object is if it has no media of its own, such as a message.

    Raises:
        RecordError: such a key names another video, picture or sound, or is a misspelt one of `MEDIA_KEYS`.
    """
    refs = tuple(refs)
    files = {path.name for ref in refs for path in ref.files}
    kinds = {ref.kind for ref in refs}
    kind_of_object = re.sub(r"\[\d+\]$", "[]", name.rpartition(".")[2])
    where = f" in a {place}" if place else ""
    beside = f", beside the {'segments' if place == 'segment' else 'messages'}" if place else ""
    unread = []
    for key, value in given.items():
        if key in known or value is None:
            continue
        field = f"{name}.{key}" if name else key
        for kind, file in _media_files(value):
            if Path(file).name not in files and not (refs and _URL.match(file)):
                fix = "no sound is heard; take the key out"
                if kind != "audio":
                    near = difflib.get_close_matches(key.lower(), (kind, f"{kind}s"), n=1, cutoff=0.0)[0]
                    fix = f"the nearest known one is {near!r}{beside}; rename it, or take it out if it is not shown"
                raise RecordError(field, f"names {short_repr(file)} under a key that is not read{where}; {fix}")
        meant = _misspelt_media_key(key)
        if meant and value and meant.rstrip("s") not in kinds:
            raise RecordError(field, f"is not read{where}; did you mean {meant!r}{beside}?")
        unread.append(f"{kind_of_object}.{key}" if name else key)
    return unread


def check_shows_nothing(record: Mapping[str, Any], keys: Iterable[str], root: Path) -> None:
    """Check a record without media, which would be trained as text alone.

    RecordError if one of `keys`, which are not read, names a folder of videos or pictures below `root`, or is the id of
    a video or picture.
    """
    for key in keys:
        value = record.get(key)
        if _SAYS_WHICH.fullmatch(key) and value not in (None, ""):
            kind = "video" if key[0].lower() in "vcy" else "image"
            what = f"{short_repr(value)} is an id, and nothing is shown"
            raise RecordError(key, f"{what}; give the file's path as {kind!r}, or take it out")
        if not isinstance(value, str) or "\0" in value or not value or not _SAYS_WHERE.search(key.lower()):
            continue
        note(root / value)
        with suppress(OSError):  # mostly there is no such folder
            suffixes = {Path(name).suffix.lower() for name in os.listdir(root / value)}
            if suffixes & (VIDEO_SUFFIXES | PICTURE_SUFFIXES):
                what = f"names the folder {short_repr(value)} under a key that is not read; the nearest known one is"
                fix = "'video', for the frames of one; rename it, or take it out if it is not shown"
                raise RecordError(key, f"{what} {fix}")


def other_keys(record: Mapping[str, Any], known: Collection[str]) -> tuple[str, ...]:
    """The keys of a record that are neither `known` nor say how its media are shown."""
    return tuple(key for key in record if key not in known and key_meaning(key) is None)


@lru_cache(maxsize=4096)  # records of a source have the same keys
def _misspelt_media_key(key: str) -> str:
    """The key of media that a key may mean; empty if none, as for `videoID`."""
    near = difflib.get_close_matches(key.lower(), MEDIA_KEYS, n=1, cutoff=0.8)
    return near[0] if near and not key.lower().endswith("id") else ""


def _media_files(value: Any) -> Iterator[tuple[str, str]]:
    """Kind and name of each media file that a value names, at any depth."""
    if isinstance(value, str):
        kind = _kind_of(value)
        if kind:
            yield kind, value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _media_files(one)


def _kind_of(text: str) -> str:
    """`video`, `image` or `audio` if a text names such a file or holds one; else empty."""
    if data := _DATA_URL.match(text):
        return data[1].lower()
    if len(text) > MAX_NAME_CHARACTERS or "\n" in text:
        return ""
    if _URL.match(text):
        text = re.split(r"[?#]", text)[0]
    suffix = Path(text.strip()).suffix.lower()
    kinds = {"video": VIDEO_SUFFIXES, "image": PICTURE_SUFFIXES, "audio": AUDIO_SUFFIXES}
    return next((kind for kind, suffixes in kinds.items() if suffix in suffixes), "")


# ------------------------------------------------------------------------------------------------------------ report


def report_unread_keys(source: str, records: Sequence[tuple[str, ...]]) -> None:
    """Log once what `describe_unread_keys` says, if anything."""
    if line := describe_unread_keys(source, records):
        log_once(line)


def describe_unread_keys(source: str, records: Sequence[tuple[str, ...]]) -> str:
    """A line with the keys of a source's records that are not read, and how many records have each; empty if there are
    none. `records` holds those keys for each record that could be used."""
    counts = Counter(key for keys in records for key in keys)
    if not counts:
        return ""
    named = [f"{_describe(key)} ({count:,})" for key, count in counts.most_common(MAX_REPORTED_KEYS)]
    more = f" and {len(counts) - MAX_REPORTED_KEYS} more" if len(counts) > MAX_REPORTED_KEYS else ""
    return f"{source}: keys that are not read, of {len(records):,} records: {', '.join(named)}{more}"


def report_new_unread_keys(source: str, origin: str, keys: Iterable[str], reported: set[str]) -> None:
    """As `report_unread_keys`, for records that come one by one: log the keys that are not yet `reported`, and add them
    there; up to `MAX_REPORTED_KEYS` in all."""
    new = [key for key in keys if key not in reported][: max(0, MAX_REPORTED_KEYS - len(reported))]
    if new:
        reported.update(new)
        log_once(f"{source}: keys that are not read, from {origin} on: {', '.join(map(_describe, new))}")


@cache
def log_once(line: str) -> None:
    """Log a line if it has not been: evaluation may read a source again."""
    logger.info("%s", line)


def _describe(key: str) -> str:
    """A key, with what it may be meant to be."""
    text = key if key.isprintable() and len(key) <= 60 else short_repr(key)
    own = key.rpartition(".")[2]
    if key_meaning(own) is not None:
        return f"{text} [no medium there takes it]"
    near = difflib.get_close_matches(own, sorted(OPTIONS["video"]), n=1, cutoff=0.8)
    return f"{text} [did you mean {near[0]}?]" if near and not own.lower().endswith("id") else text
