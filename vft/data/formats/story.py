"""Summaries and stories: the project's own JSON or JSONL, which `tools/convert/` writes from public sets.

`{"id"?, "video": path | "images": [paths], "segments"?: [{"start_s", "end_s", "text"}], "text", "speech"?}`: `text` is
the answer about the video or the pictures, `segments` describe parts of it, `speech` is what is heard in it, or a file
of subtitles (.srt, .vtt). A `question` (`prompt`, `query`, ...) replaces the task's. `system` and the keys of
`media_options` are read as in messages. Segments count from the beginning of the file. Other keys stay in the sample's
fields.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.types import MediaOptions, MediaRef, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.formats.messages import with_system
from vft.data.media.timed_text import parse_srt
from vft.data.records.files import read_samples, read_text, record_files
from vft.data.records.foreign_records import QUESTIONS, Normalizer
from vft.data.records.inputs import note
from vft.data.records.media_options import MAX_S, apply_options
from vft.data.records.paths import find_path, resolve_media
from vft.data.records.record import ParsedRecord, RecordError, Records, check_text, list_keys, short_repr
from vft.data.records.unread_keys import answer_lists, find_unread_keys

KEYS = ("video", "images", "segments", "text", "speech")
SEGMENT_KEYS = ("start_s", "end_s", "text")


class Story(Format):
    """The samples of a file, of the files that a pattern matches, or of a folder (see `record_files`).

    The user's turn holds the media and the record's own question; without one the task asks. Fields: `segments` is a
    tuple of (start_s, end_s, text) by start; `speech` a text, empty if there is none.
    """

    settings = frozenset({"columns"})
    notes_inputs = True
    columns = frozenset({*KEYS, "question", "system", "id"})

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`. UserError also if no record has a column that `columns` names."""
        path = find_path(data.root, source.path)
        normalizer = Normalizer(data.root, source.columns)
        samples, bad = read_samples(record_files(path), lambda record, _: parse(record, data.root), normalizer.rename)
        normalizer.check_columns(path)
        return samples, bad


def parse(record: Mapping[str, Any], root: Path) -> ParsedRecord:
    """The turns of a record, and its `segments` and `speech`. RecordError names the field that is wrong."""
    for key in record:
        # If it passed, a misspelt key would silently lose its content.
        meant = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)
        if key not in KEYS and meant and record.get(meant[0]) is None:
            raise RecordError(key, f"unknown key; did you mean {meant[0]!r}?")
    text = _text(record.get("text"), "text", f"the record has {list_keys(record)}; put the answer under 'text'")
    segments, speech = record.get("segments"), record.get("speech")
    if segments is not None and not isinstance(segments, list):
        raise RecordError("segments", f'{short_repr(segments)} must be a list of {{"start_s", "end_s", "text"}}')
    told = [_segment(segment, f"segments[{i}]") for i, segment in enumerate(segments or ())]
    facts: dict[str, object] = {
        "segments": tuple(sorted(told, key=lambda segment: segment[:2])),
        "speech": "",
    }
    question, question_keys = _question(record)
    turns, used = apply_options([("user", [*_media(record, root), *question])], record, "")
    refs = [part for part in turns[0][1] if isinstance(part, MediaRef)]
    if told and (start_s := refs[0].options.video_start):
        raise RecordError("segments", f"stand beside a video that is shown from {start_s:g} s on; keep one of the two")
    if speech is not None:
        facts["speech"] = _speech(check_text(speech, "speech"), refs[0].options, root)
    unread = find_unread_keys(record, {*KEYS, "id", "system", *question_keys, *used, *answer_lists(record)}, refs)
    for i, segment in enumerate(segments or ()):
        unread += find_unread_keys(segment, SEGMENT_KEYS, refs, f"segments[{i}]", "segment")
    asked = [Turn(role, tuple(parts)) for role, parts in with_system(record, turns)]
    return ParsedRecord((*asked, Turn("assistant", (text,))), tuple(dict.fromkeys(unread)), facts)


def _question(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The record's own question, if it has one, and the keys that hold it. RecordError if two differ."""
    keys = [key for key in QUESTIONS if record.get(key) not in (None, "")]
    texts = {check_text(record[key], key) for key in keys}
    if len(texts) > 1:
        raise RecordError(keys[1], f"is another question than {keys[0]!r}; keep one of the two")
    return [text for text in texts if text.strip()], keys


def _media(record: Mapping[str, Any], root: Path) -> tuple[MediaRef, ...]:
    video, images = record.get("video"), record.get("images")
    if (video is None) == (images is None):
        has = list_keys(record) if video is None else "both"
        raise RecordError("video", f"the record needs either 'video' or 'images'; it has {has}")
    if video is not None:
        if isinstance(video, list):
            raise RecordError("video", f"{short_repr(video)} must be one file; a run of pictures goes under 'images'")
        return (MediaRef("video", resolve_media(root, video, "video"), field="video"),)
    if record.get("segments"):
        raise RecordError("segments", "stand beside 'images', and a run of pictures has no seconds; take them out")
    if not isinstance(images, list) or not images:
        raise RecordError("images", f"{short_repr(images)} must be a list with at least one picture")
    named = [(f"images[{i}]", image) for i, image in enumerate(images)]
    return tuple(MediaRef("image", resolve_media(root, image, field), field=field) for field, image in named)


def _speech(text: str, shown: MediaOptions, root: Path) -> str:
    """What is said: the text itself, or that of a file of subtitles in the part of the video that is `shown`."""
    if not text.lower().endswith((".srt", ".vtt")):
        return text
    path = resolve_media(root, text, "speech")
    note(path)
    try:
        lines = parse_srt(read_text(path), str(path))
    except UserError as error:
        raise RecordError("speech", str(error)) from None
    first_s, last_s = shown.video_start or 0.0, shown.video_end or math.inf
    return " ".join(line for start_s, end_s, line in lines if start_s < last_s and end_s > first_s)


def _segment(value: object, field: str) -> tuple[float, float, str]:
    if not isinstance(value, dict):
        raise RecordError(field, f"{short_repr(value)} must be an object with 'start_s', 'end_s' and 'text'")
    for name in ("start_s", "end_s"):
        seconds = value.get(name)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < MAX_S:
            has = f"; the segment has {list_keys(value)}" if name not in value else ""
            raise RecordError(f"{field}.{name}", f"{short_repr(seconds)} must be a number of seconds, from 0{has}")
    start_s, end_s = float(value["start_s"]), float(value["end_s"])
    if start_s >= end_s:
        raise RecordError(f"{field}.start_s", f"{start_s:g} is not below end_s = {end_s:g}; give seconds, start first")
    return start_s, end_s, _text(value.get("text"), f"{field}.text", "say what happens in the segment")


def _text(value: object, field: str, fix: str) -> str:
    if value is None:
        raise RecordError(field, f"is missing; {fix}")
    text = check_text(value, field)
    if not text.strip():
        raise RecordError(field, f"is empty; {fix}")
    return text
