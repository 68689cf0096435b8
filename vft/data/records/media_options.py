"""Keys by which a record says how its media are shown: frames, pixels, and which part of a video.

The names are qwen-vl-utils' (`fps`, `nframes`, `max_pixels`, `video_start`, ...). Other spellings are read if they can
mean nothing else: `max-pixels`, `maxFrames`, `start` and `end`, `clip_start`, `end_time`, `start_ms`,
`trim = [start, end]`. A key in a part, or in an object of a list of media, is about that medium; a key in a message is
about the media there, and one of the record about all its media. The nearest one counts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from vft.common.types import MediaKind, MediaOptions, MediaRef, Role
from vft.data.records.record import Record, RecordError, short_repr

OPTIONS: dict[MediaKind, frozenset[str]] = {
    "video": frozenset(option.name for option in fields(MediaOptions)),
    "image": frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width"}),
}
OF_FRAME_LISTS = frozenset({"sample_fps", "timestamps"})
"""Options of a video that is a list of pictures; a file has its own frames and times."""
EDGES = frozenset({"video_start", "video_end"})
REAL_OPTIONS = frozenset({"fps", "video_start", "video_end", "sample_fps"})
LIST_OPTIONS = frozenset({"trim", "timestamps"})
"""Options of which one value is itself a list."""
NO_OPTIONS = MediaOptions()
MAX_S = 1e9
"""Times from here on are not seconds."""
ALTERNATIVES = (("fps", "nframes"), ("resized_height", "resized_width"), ("sample_fps", "timestamps"))
"""If one of a pair is given nearer to the medium, it replaces the other too."""
ORDERED = (("min_frames", "max_frames"), ("min_pixels", "max_pixels"), ("video_start", "video_end"))

_EDGE = re.compile(
    r"(?:video|clip|trim|segment|frame|time|t)?(start|begin|end|finish|stop(?=.))(?:time|timestamp|offset|in)?"
    r"(s|secs?|seconds?|ms|msecs?|millis|milliseconds?|frames?|frameid|(?:frame)?(?:idx|index))?"
)
"""Keys, without separators, for where a part begins or ends. `stop` alone is a setting of text generation."""
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):([0-5]?\d(?:[.,]\d+)?)")
"""A time as hh:mm:ss or mm:ss, with a fraction."""
_TRIMS = frozenset({"trim", "videotrim", "trimrange", "videorange", "cliprange"})
_AMBIGUOUS = frozenset(
    {"timestamp", "timestamps", "timespan", "timerange", "times", "cliptime", "cliptimes", "clip", "segment"}
    | {"interval", "span", "window", "moment", "range"}
)
"""Keys under which some sets keep the part of the video to show, and others the times that are the answer."""


@dataclass(frozen=True, slots=True)
class KeyMeaning:
    """What a key sets: an option, or `trim`, which is two of them."""

    option: str
    unit_s: float = 1.0
    in_frames: bool = False


def _compact(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())


_BY_COMPACT_NAME = {_compact(option): option for option in OPTIONS["video"]}


@lru_cache(maxsize=4096)  # records of a source have the same keys
def key_meaning(key: str) -> KeyMeaning | None:
    """What a key says about a medium. None if it says nothing."""
    compact = _compact(key)
    if compact in _BY_COMPACT_NAME:
        return KeyMeaning(_BY_COMPACT_NAME[compact])
    if compact in _TRIMS:
        return KeyMeaning("trim")
    edge = _EDGE.fullmatch(compact)
    if edge is None:
        return None
    option = "video_start" if edge[1] in ("start", "begin") else "video_end"
    unit = edge[2] or ""
    in_frames = "frame" in compact or unit[:3] in ("idx", "ind")
    return KeyMeaning(option, 1e-3 if unit[:1] == "m" else 1.0, in_frames)


def options_of_part(given: Mapping[str, Any], kind: MediaKind, is_list: bool, name: str) -> MediaOptions:
    """The options in the object of one medium, called `name` in the record.

    Raises:
        RecordError: an unknown key, a value of another type or out of range, or two that contradict each other.
    """
    allowed = OPTIONS[kind] if is_list else OPTIONS[kind] - OF_FRAME_LISTS
    for key in given:
        meaning = key_meaning(key)
        if meaning is None or meaning.option not in {*allowed, *(["trim"] if kind == "video" else [])}:
            near = difflib.get_close_matches(key, sorted(allowed), n=1)
            meant = f"; did you mean {near[0]!r}?" if near else f"; allowed are {', '.join(sorted(allowed))}"
            raise RecordError(_at(name, key), f"unknown key{meant}")
    return _options(given, name)


Turns = list[tuple[Role, list[str | MediaRef]]]


def apply_options(turns: Turns, given: Mapping[str, Any], name: str) -> tuple[Turns, frozenset[str]]:
    """The turns, with the options in `given` for media that have none of their own; and the keys that were used.

    A value is for all media that can take it; a list holds one for each of them, in reading order. `name` is the object
    that has the keys, empty for the record itself.

    Raises:
        RecordError: as `options_of_part`; or a list of another length.
    """
    media = [part for _, parts in turns for part in parts if isinstance(part, MediaRef)]
    if not media:
        return turns, frozenset()
    given_to: list[Record] = [{} for _ in media]
    used: set[str] = set()
    for key, value in given.items():
        meaning = key_meaning(key)
        takers = [own for own, ref in zip(given_to, media, strict=True) if meaning and _takes(ref, meaning.option)]
        if meaning is None or not takers:
            _refuse_ambiguous(key, value, media, _at(name, key))
            continue
        used.add(key)
        for own, own_value in zip(takers, _spread(value, len(takers), meaning, _at(name, key)), strict=True):
            if own_value is not None:
                own[key] = own_value
    refs = [replace(ref, options=_options(own, name, ref.options)) for own, ref in zip(given_to, media, strict=True)]
    for ref in refs:
        times_s = ref.options.timestamps
        if times_s is not None and isinstance(ref.path, tuple) and len(times_s) != len(ref.path):
            counts = f"has {len(ref.path)} pictures but {len(times_s)} timestamps"
            raise RecordError(ref.field, f"{counts}; give one for each")
    rest = iter(refs)
    filled: Turns = [
        (role, [next(rest) if isinstance(part, MediaRef) else part for part in parts]) for role, parts in turns
    ]
    return filled, frozenset(used)


def _takes(ref: MediaRef, option: str) -> bool:
    if option in OF_FRAME_LISTS:
        return isinstance(ref.path, tuple)
    return option in OPTIONS[ref.kind] or (option == "trim" and ref.kind == "video")


def _spread(value: Any, count: int, meaning: KeyMeaning, field: str) -> Sequence[Any]:
    """The value for each of `count` media."""
    is_one_each = isinstance(value, list)
    if meaning.option in LIST_OPTIONS:
        is_one_each = is_one_each and all(one is None or isinstance(one, list) for one in value)
    if not is_one_each:
        return [value] * count
    if len(value) != count:
        counts = f"has {len(value)} values for {count} media"
        raise RecordError(field, f"{short_repr(value)} {counts}; give one, or one for each")
    return list(value)


def _refuse_ambiguous(key: str, value: Any, media: Sequence[MediaRef], field: str) -> None:
    """RecordError for two numbers under `timestamp` and the like. If they are the answer, a video cut to them would
    give it away."""
    is_pair = isinstance(value, list) and len(value) == 2 and all(_is_number(one, whole=False) for one in value)
    if is_pair and _compact(key) in _AMBIGUOUS and any(r.kind == "video" and isinstance(r.path, Path) for r in media):
        raise RecordError(
            field,
            f"{short_repr(value)} may be the part of the video to show, or an answer's times; say 'video_start' and "
            "'video_end' to show that part alone, else take the key out",
        )


def _options(given: Mapping[str, Any], name: str, own: MediaOptions = NO_OPTIONS) -> MediaOptions:
    """The options of one medium from the keys of the object called `name`; the medium's `own` take precedence.

    RecordError if they contradict each other.
    """
    keys: dict[str, str] = {}
    options: dict[str, Any] = {}
    for key, value in given.items():
        for option, number in _settings(key, value, _at(name, key)):
            if options.setdefault(option, number) != number:
                both = f"{short_repr(value)} contradicts {keys[option]} = {options[option]}"
                raise RecordError(_at(name, key), f"{both}; keep one of the two")
            keys[option] = key
    if not options:
        return own
    inner = {one.name: getattr(own, one.name) for one in fields(own) if getattr(own, one.name) is not None}
    replaced = {one for pair in ALTERNATIVES if any(one in inner for one in pair) for one in pair}
    options = {option: value for option, value in options.items() if option not in replaced} | inner

    def fail(option: str, message: str) -> None:
        raise RecordError(_at(name, keys.get(option, option)), message)

    for low, high in ORDERED:
        if low in options and high in options:
            a, b, other = options[low], options[high], keys.get(high, high)
            if a > b or (low == "video_start" and a == b):
                fail(low, f"{a} is {'above' if a > b else 'no earlier than'} {other} = {b}; exchange them")
    if "fps" in options and "nframes" in options:
        fail("nframes", f"{options['nframes']} stands beside fps = {options['fps']}; keep one of the two")
    times_s, rate = options.get("timestamps", ()), options.get("sample_fps")
    if rate and len(times_s) > 1 and abs((len(times_s) - 1) / (times_s[-1] - times_s[0]) / rate - 1) > 0.1:
        stated = f"{len(times_s)} timestamps in {times_s[-1] - times_s[0]:g} s"
        fail("sample_fps", f"{rate} a second contradicts {stated}; keep one of the two")
    if ("resized_height" in options) != ("resized_width" in options):
        fail("resized_height", "goes with resized_width; give both or neither")
    return MediaOptions(**options)


def _settings(key: str, value: Any, field: str) -> Iterator[tuple[str, Any]]:
    """The options that a key sets, each with its value. RecordError if it is of another type or out of range."""
    meaning = key_meaning(key)
    assert meaning is not None
    if meaning.in_frames:
        fix = "give seconds, as video_start, video_end"
        raise RecordError(field, f"{short_repr(value)}: frame numbers are not read; {fix}")
    if meaning.option == "timestamps":
        yield meaning.option, _times(value, field)
        return
    values = {meaning.option: value}
    if meaning.option == "trim":
        if not isinstance(value, list) or len(value) != 2:
            raise RecordError(field, f"{short_repr(value)} must be [start, end] in seconds")
        values = dict(zip(("video_start", "video_end"), value, strict=True))
    for option, number in values.items():
        if number is None:
            continue
        if meaning.unit_s == 1.0 and option in EDGES and (clock := _CLOCK.fullmatch(str(number).strip())):
            number = float(clock[1] or 0) * 3600 + float(clock[2]) * 60 + float(clock[3].replace(",", "."))
        at_least = 0 if option == "video_start" else 1e-6 if option in REAL_OPTIONS else 1
        if not _is_number(number, whole=option not in REAL_OPTIONS) or number < at_least:
            what = "a number" if option in REAL_OPTIONS else "a whole number"
            form = ", such as 90.5 or 1:30.5" if option in EDGES and isinstance(number, str) else ""
            raise RecordError(field, f"{short_repr(number)} must be {what} of at least {at_least:g}{form}")
        yield option, number if meaning.unit_s == 1.0 else number * meaning.unit_s


def _times(value: Any, field: str) -> tuple[float, ...]:
    """The times of pictures, in seconds and in order."""
    if not isinstance(value, list) or not all(_is_number(one, whole=False) and 0 <= one < MAX_S for one in value):
        raise RecordError(field, f"{short_repr(value)} must be a list of seconds from 0, one for each picture")
    for i, (before, after) in enumerate(pairwise(value), 1):
        if after < before:
            raise RecordError(f"{field}[{i}]", f"{after} comes before {before}; give the times in order")
    if len(value) > 1 and value[0] == value[-1]:
        raise RecordError(field, f"all {len(value)} times are {value[0]}; give each picture its own")
    return tuple(map(float, value))


def _at(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**53
