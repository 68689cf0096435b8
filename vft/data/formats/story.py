"""Summaries and stories: the project's own JSON or JSONL, which `tools/convert/` writes from public sets.

`{"id"?, "video": path | "images": [paths], "segments"?: [{"start_s", "end_s", "text"}], "text", "speech"?}`: `text` is
what is to be said about the video or the run of pictures, `segments` tell parts of it, `speech` is what is heard in it.
A `question` (`prompt`, `query`, ...) is asked in the place of the task's. `system` and the keys of
`vft.data.formats.media_options` are read as in messages. Segments count from the beginning of the file. Other keys stay
in the sample's fields.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vft.common.types import MediaRef, Sample, Turn
from vft.data.formats.media_options import MAX_S, lay_under
from vft.data.formats.messages import with_system
from vft.data.formats.records import BadRecord, Parsed, RecordError, check_text, collect, names_in, resolve_media, shown
from vft.data.formats.rows import files_of, read_rows
from vft.data.formats.shapes import QUESTIONS, Shapes
from vft.data.formats.unread_keys import answer_lists, unread

KEYS = ("video", "images", "segments", "text", "speech")
SEGMENT_KEYS = ("start_s", "end_s", "text")


def read(path: Path, root: Path, columns: Mapping[str, str] | None = None) -> tuple[list[Sample], list[BadRecord]]:
    """The samples of a file (or of a folder, see `files_of`) and the records that can't be used.

    Media are relative to `root`; `columns` says how keys are called, by their name here.

    The user's turn holds the media and the record's own question; without one the task asks. Fields: `segments` is a
    tuple of (start_s, end_s, text) by start, empty where there are none; `speech` a text, empty where there is none.

    Raises:
        UserError: the file as a whole can't be read.
    """
    shapes = Shapes(root, columns or {})
    samples, bad = collect(files_of(path), lambda record, _: parse(record, root), read_rows, shapes.as_named)
    shapes.check_columns(path)
    return [replace(sample, fields={**sample.fields, **facts(sample.fields)}) for sample in samples], bad


def parse(record: Mapping[str, Any], root: Path) -> Parsed:
    """The turns of a record. RecordError names the field."""
    for key in record:
        # Left alone, a misspelt key would silently lose what it holds.
        meant = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        if key not in KEYS and meant and record.get(meant[0]) is None:
            raise RecordError(key, f"unknown key; did you mean {meant[0]!r}?")
    text = _text(record.get("text"), "text", f"the record has {names_in(record)}; call what is to be said 'text'")
    segments = facts(record)["segments"]
    question, asking = _question(record)
    asked, used = lay_under([("user", [*_media(record, root), *question])], record, "")
    refs = [part for part in asked[0][1] if isinstance(part, MediaRef)]
    if segments and (start_s := refs[0].options.video_start):
        raise RecordError("segments", f"stand beside a video that is shown from {start_s:g} s on; keep one of the two")
    rest = unread(record, {*KEYS, "id", "system", *asking, *used, *answer_lists(record)}, refs)
    for i, segment in enumerate(record.get("segments") or ()):
        unknown = unread(segment, SEGMENT_KEYS, refs, f"segments[{i}]", "segment")
        rest += [f"segments[].{key.rpartition('.')[2]}" for key in unknown]
    turns = (*(Turn(role, tuple(parts)) for role, parts in with_system(record, asked)), Turn("assistant", (text,)))
    return Parsed(turns, tuple(dict.fromkeys(rest)))


def _question(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The record's own question, if it has one, and the keys that hold it. RecordError where two differ."""
    asking = [key for key in QUESTIONS if record.get(key) not in (None, "")]
    said = {check_text(record[key], key) for key in asking}
    if len(said) > 1:
        raise RecordError(asking[1], f"is another question than {asking[0]!r}; keep one of the two")
    return [text for text in said if text.strip()], asking


def _media(record: Mapping[str, Any], root: Path) -> tuple[MediaRef, ...]:
    video, images = record.get("video"), record.get("images")
    if (video is None) == (images is None):
        found = names_in(record) if video is None else "both"
        raise RecordError("video", f"the record needs either 'video' or 'images'; it has {found}")
    if video is not None:
        if isinstance(video, list):
            raise RecordError("video", f"{shown(video)} must be one file; a run of pictures goes under 'images'")
        return (MediaRef("video", resolve_media(root, video, "video"), field="video"),)
    if record.get("segments"):
        raise RecordError("segments", "stand beside 'images', and a run of pictures has no seconds; take them out")
    if not isinstance(images, list) or not images:
        raise RecordError("images", f"{shown(images)} must be a list with at least one picture")
    named = [(f"images[{i}]", image) for i, image in enumerate(images)]
    return tuple(MediaRef("image", resolve_media(root, image, field), field=field) for field, image in named)


def facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """`segments` and `speech`, checked."""
    segments, speech = record.get("segments"), record.get("speech")
    if segments is not None and not isinstance(segments, list):
        raise RecordError("segments", f'{shown(segments)} must be a list of {{"start_s", "end_s", "text"}}')
    parsed = [_segment(segment, f"segments[{i}]") for i, segment in enumerate(segments or [])]
    return {
        "segments": tuple(sorted(parsed, key=lambda segment: segment[:2])),
        "speech": "" if speech is None else check_text(speech, "speech"),
    }


def _segment(value: object, field: str) -> tuple[float, float, str]:
    if not isinstance(value, dict):
        raise RecordError(field, f"{shown(value)} must be an object with 'start_s', 'end_s' and 'text'")
    start_s, end_s = (_seconds(value, name, f"{field}.{name}") for name in ("start_s", "end_s"))
    if start_s >= end_s:
        raise RecordError(f"{field}.start_s", f"{start_s:g} is not below end_s = {end_s:g}; give seconds, start first")
    return start_s, end_s, _text(value.get("text"), f"{field}.text", "say what happens in the segment")


def _seconds(segment: Mapping[str, Any], name: str, field: str) -> float:
    value = segment.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_S:
        has = f"; the segment has {names_in(segment)}" if name not in segment else ""
        raise RecordError(field, f"{shown(value)} must be a number of seconds, from 0{has}")
    return float(value)


def _text(value: object, field: str, mend: str) -> str:
    if value is None:
        raise RecordError(field, f"is missing; {mend}")
    text = check_text(value, field)
    if not text.strip():
        raise RecordError(field, f"is empty; {mend}")
    return text
