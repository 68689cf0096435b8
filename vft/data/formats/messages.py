"""A user's own records: OpenAI messages, ShareGPT and LLaVA conversations, recognised by their keys.

`messages` holds `role` and `content`, `conversations` holds `from` and `value` (either pair is read in either). Media
are typed parts; or lists (`videos`, `images`, or `video`, `image`) with a `<video>` or `<image>` in the text for each,
in order. In LLaVA's layout `<image>` stands for the video too, and is on a line of its own. A video may be a folder of
its frames, which is sampled as a file is.

A record without turns has a medium, an answer and mostly a question under other keys (`foreign_records` reads them). It
may lack a question; the task asks then. Files are JSON, JSONL, CSV, TSV, Parquet or Arrow.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vft.common.types import MediaKind, MediaOptions, MediaRef, Role, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data.formats import Format
from vft.data.records.files import read_classes, read_samples, record_files
from vft.data.records.foreign_records import Normalizer
from vft.data.records.media_options import NO_OPTIONS, Turns, apply_options, options_of_part
from vft.data.records.paths import PICTURE_SUFFIXES, find_path, resolve_frames, resolve_media, resolve_path
from vft.data.records.preferences import DESIRABLE, REJECTED, given_field, with_preference
from vft.data.records.record import (
    REASONING,
    TURN_KEYS,
    ParsedRecord,
    Record,
    RecordError,
    Records,
    check_text,
    list_keys,
    read_reasoning,
    short_repr,
)
from vft.data.records.unread_keys import MEDIA_KEYS, answer_lists, check_shows_nothing, find_unread_keys

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
KINDS: tuple[MediaKind, ...] = ("image", "video")
PLACEHOLDER = re.compile(r"<(video|image)>")
LINE_PLACEHOLDER = re.compile(r"(?:\n(?=<\w+>\Z))?<(video|image)>\n?")
"""LLaVA's placeholder, with the line break that separates it from the question."""

SAMPLED = "sampled"
"""Key for where the answers of a record are from, if a model gave them (`vft pairs`)."""
FIELDS = frozenset({"id", "system", "speech", "options", "labels", "groups", SAMPLED, REJECTED, DESIRABLE, *MEDIA_KEYS})
"""Keys beside the turns; tasks read some of them."""
PART_KINDS: dict[str, MediaKind] = {"video": "video", "image": "image", "video_url": "video", "image_url": "image"}
MESSAGE_KEYS = frozenset({"role", "content", "from", "value", "weight", "loss", *REASONING})


class Messages(Format):
    """The samples of a file, of the files that a pattern matches, or of a folder (see `record_files`).

    The source's `columns` give the names that keys have in these records, and `media` is the folder of their files.
    Files that a table itself holds, as the hub's do, are written to the cache folder once. If the records are clips
    with labels, all labels are those of `classes.txt` (a name a line) beside the file, else those that occur.
    """

    settings = frozenset({"columns", "media"})
    notes_inputs = True
    columns = frozenset(
        {"messages", "conversations", "video", "videos", "image", "images", "question", "answer", "label", "system"}
        | {"id", "input", "history", "options", "labels", "start", "end", "video_start", "video_end", "fps", "nframes"}
        | {"min_frames", "max_frames", "min_pixels", "max_pixels", "sample_fps", "timestamps"}
    )

    def check(self, source: SourceConfig) -> None:
        """ValueError if two columns are the answer."""
        if {"answer", "label"} <= set(source.columns):
            raise ValueError("columns: answer and label are both what is learnt; keep one")

    def read(self, source: SourceConfig, data: DataConfig) -> Records:
        """As `Format.read`. UserError also if no record has a column that `columns` names."""
        path, root = find_path(data.root, source.path), data.root / source.media
        classes = read_classes(path if path.is_dir() else path.parent)
        labels_given, unpacked = classes[1] if classes else (), data.cache_path / "files"
        normalizer = Normalizer(root, source.columns, classes=labels_given, unpacked=unpacked)

        given: Record = {}

        def normalize(record: Record, file: Path) -> list[Record]:
            nonlocal given
            given = record
            return normalizer.normalize(with_preference(record), file)

        def parse_made(record: Record, _: Path) -> ParsedRecord:
            try:
                return parse(record, root)
            except RecordError as error:
                raise RecordError(given_field(given, error.field), error.message) from None

        samples, bad = read_samples(record_files(path), parse_made, normalize)
        normalizer.check_columns(path)
        labels = tuple(normalizer.classes or sorted(set(normalizer.labels)))
        return [
            replace(sample, fields={**sample.fields, "labels": labels})
            if sample.fields.get("labels") is normalizer.labels
            else sample
            for sample in samples
        ], bad


def parse(record: Mapping[str, Any], root: Path, needs_answer: bool = True) -> ParsedRecord:
    """The turns of a record with `messages` or `conversations`. RecordError names the field that is wrong."""
    present = [key for key in TURN_KEYS if record.get(key) is not None]
    if len(present) != 1:
        either = "the record needs either 'messages' or 'conversations'"
        raise RecordError("messages", f"{either}; it has {list_keys(record)}")
    key = present[0]
    entries = record[key]
    if not isinstance(entries, list) or not entries:
        raise RecordError(key, f"{short_repr(entries)} must be a list with at least one message")
    listed = {kind: _list_media(record, kind, root) for kind in KINDS}
    all_listed = [ref for kind in KINDS for ref in listed[kind]]
    is_llava = key == "conversations" and all(record.get(f"{kind}s") is None for kind in KINDS)
    reader = _MessageReader(root, bool(all_listed), LINE_PLACEHOLDER if is_llava else PLACEHOLDER)
    turns = [reader.message(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]
    known = FIELDS | {key} | answer_lists(record)
    try:
        turns = _fill_placeholders(turns, listed, record, key)
    except RecordError:
        # If the medium that a placeholder lacks is under an unknown key, that key is what is wrong.
        find_unread_keys(record, known, all_listed)
        raise
    message_keys: list[str] = []
    for i, entry in enumerate(entries):
        turns[i : i + 1], used = apply_options(turns[i : i + 1], entry, f"{key}[{i}]")
        refs = [part for part in turns[i][1] if isinstance(part, MediaRef)]
        message_keys += find_unread_keys(entry, MESSAGE_KEYS | used, refs, f"{key}[{i}]", "message")
    turns, used = apply_options(turns, record, "")
    refs = [part for _, parts in turns for part in parts if isinstance(part, MediaRef)]
    record_keys = find_unread_keys(record, known | used, refs)
    if not refs:
        check_shows_nothing(record, record_keys, root)
    turns = with_system(record, turns)
    for i, (role, parts) in enumerate(turns):
        if not any(not isinstance(part, str) or part.strip() for part in parts):
            raise RecordError(f"{key}[{i}]", f"the {role}'s turn is empty; give it a text or take it out")
    if needs_answer and not any(role == "assistant" for role, _ in turns):
        raise RecordError(key, "has no assistant turn; add the answer to learn")
    shown = next((i for i, (_, parts) in enumerate(turns) if any(isinstance(part, MediaRef) for part in parts)), 0)
    if needs_answer and not any(role == "assistant" for role, _ in turns[shown:]):
        raise RecordError(key, "no assistant turn follows the video or picture; put the answer behind it")
    unread = tuple(dict.fromkeys([*message_keys, *reader.unread, *record_keys]))
    return ParsedRecord(tuple(Turn(role, tuple(filter(None, parts))) for role, parts in turns), unread)


def with_system(record: Mapping[str, Any], turns: Turns) -> Turns:
    """The turns after the record's own `system`. RecordError if they have another system text themselves."""
    system = check_text(record.get("system") or "", "system")
    if not system:
        return turns
    for role, parts in turns:
        text = "".join(part for part in parts if isinstance(part, str))
        if role == "system" and text != system:
            both = f"{short_repr(system)} stands beside a system turn, {short_repr(text)}"
            raise RecordError("system", f"{both}; keep one of the two")
    return turns if turns[0][0] == "system" else [("system", [system]), *turns]


# --------------------------------------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class _MessageReader:
    """Reads messages one by one."""

    root: Path
    has_lists: bool
    """Whether the record lists media beside its text."""
    placeholder: re.Pattern[str]
    unread: list[str] = field(default_factory=list)
    """Keys of parts that are not read, so far."""

    def message(self, entry: object, name: str) -> tuple[Role, list[str | MediaRef]]:
        """The role and the parts of a message, called `name` in the record. Placeholders are media without a path."""
        if not isinstance(entry, dict):
            raise RecordError(name, f"{short_repr(entry)} must be an object with 'role' and 'content'")
        role_key, content_key = ("role", "content") if "role" in entry else ("from", "value")
        for key in (role_key, content_key):
            if key not in entry:
                raise RecordError(f"{name}.{key}", f"is missing; the message has {list_keys(entry)}")
        other = "value" if content_key == "content" else "content"
        if entry.get(other) is not None:
            raise RecordError(f"{name}.{other}", f"stands beside {content_key!r}; keep one of the two")
        for key in ("weight", "loss"):  # others' masks of answers
            if entry.get(key) not in (None, 1, True):
                raise RecordError(
                    f"{name}.{key}", f"{short_repr(entry[key])}: every answer is learnt; split the record"
                )
        role_name = entry[role_key]
        if not isinstance(role_name, str) or role_name not in ROLES:
            allowed = ", ".join(ROLES)
            raise RecordError(f"{name}.{role_key}", f"unknown role {short_repr(role_name)}; allowed are {allowed}")
        role, content = ROLES[role_name], entry[content_key]
        parts: list[str | MediaRef] = [read_reasoning(entry, role, content, name)]
        name = f"{name}.{content_key}"
        if not isinstance(content, list):
            return role, [*parts, *self._text(content, role, name, split=True)]
        # If one part is a medium, a placeholder in the texts beside it is plain text.
        has_typed_media = any(isinstance(part, dict) and part.get("type") != "text" for part in content)
        for i, part in enumerate(content):
            parts += self._part(part, role, f"{name}[{i}]", split=self.has_lists and not has_typed_media)
        return role, parts

    def _text(self, value: object, role: Role, name: str, split: bool) -> list[str | MediaRef]:
        """A text, with `split` cut at its placeholders. A placeholder in an answer is plain text."""
        text = check_text(value, name)
        if role == "assistant" or not split:
            return [text]
        pieces = self.placeholder.split(text)  # texts, and the kinds of media between them
        return [MediaRef(PART_KINDS[piece], ()) if i % 2 else piece for i, piece in enumerate(pieces)]

    def _part(self, part: object, role: Role, name: str, split: bool) -> list[str | MediaRef]:
        """A typed part: a text, or a medium."""
        if not isinstance(part, dict):
            raise RecordError(name, f"{short_repr(part)} must be an object with 'type'")
        part = {key: value for key, value in part.items() if value is not None}  # `datasets` fills missing keys so
        kind_name = part.pop("type", None)
        if kind_name == "text":
            self.unread.extend(find_unread_keys(part, {"text"}, (), name, "text"))
            return self._text(part.get("text"), role, f"{name}.text", split)
        if not isinstance(kind_name, str) or kind_name not in PART_KINDS:
            near = difflib.get_close_matches(str(kind_name), ("text", "video", "image"), n=1, cutoff=0.4)
            meant = f"; did you mean {near[0]!r}?" if near else "; allowed are text, video, image"
            raise RecordError(f"{name}.type", f"unknown type {short_repr(kind_name)}{meant}")
        if role == "assistant":
            raise RecordError(name, f"a part of type {kind_name} in an answer; media belong in the user's turns")
        kind = PART_KINDS[kind_name]
        if isinstance(inner := part.get(f"{kind}_url"), dict) and "detail" in inner:  # of OpenAI's requests
            self.unread.append(f"content[].{kind}_url.detail")
            part = {**part, f"{kind}_url": {key: value for key, value in inner.items() if key != "detail"}}
        if not part and self.has_lists:
            return [MediaRef(kind, ())]
        return [_medium(self.root, kind, part, name)]


# ------------------------------------------------------------------------------------------------------------ media


def _medium(root: Path, kind: MediaKind, part: dict[str, Any], name: str) -> MediaRef:
    """A medium that an object names, with options of its own."""
    keys = [key for key in (kind, f"{kind}_url", "path", "url") if part.get(key) is not None]
    if len(keys) != 1:
        raise RecordError(name, f"needs exactly one of {kind!r}, '{kind}_url'; it has {short_repr(sorted(part))}")
    value = part.pop(keys[0])
    if isinstance(value, dict):  # {"url": ...}, perhaps with options
        inner = {key: one for key, one in value.items() if one is not None}
        if both := part.keys() & inner.keys():
            raise RecordError(f"{name}.{min(both)}", f"stands in {keys[0]!r} too; keep one of the two")
        value = inner.pop("url", None)
        part |= inner
    is_list = isinstance(value, list) or (
        kind == "video" and isinstance(value, str) and stat.S_ISDIR(resolve_path(root, value, name)[1])
    )
    options = options_of_part(part, kind, is_list, name)
    return _reference(root, kind, value, f"{name}.{keys[0]}", options)


def _reference(root: Path, kind: MediaKind, value: object, name: str, options: MediaOptions = NO_OPTIONS) -> MediaRef:
    if kind == "video" and isinstance(value, list):
        if not value:
            raise RecordError(name, "[] is an empty list of frames; name at least one picture")
        frames = tuple(resolve_media(root, frame, f"{name}[{i}]") for i, frame in enumerate(value))
        return MediaRef(kind, frames, options, name)
    if isinstance(value, dict):
        given = {key: one for key, one in value.items() if one is not None and (key, one) != ("type", kind)}
        return _medium(root, kind, given, name)
    if isinstance(value, Path):  # a file that the record held, which `Normalizer` has written
        return MediaRef(kind, value, options, name, member=f"files/{value.name}")
    path, mode = resolve_path(root, value, name)
    if kind == "video" and stat.S_ISDIR(mode):
        return MediaRef(kind, resolve_frames(root, str(path), name), options, name, is_folder=True)
    return MediaRef(kind, resolve_media(root, value, name), options, name)


def _list_media(record: Mapping[str, Any], kind: MediaKind, root: Path) -> list[MediaRef]:
    """The media that a record lists beside its text, under `videos` or `video` (`images`, `image`)."""
    keys = [key for key in (f"{kind}s", kind) if record.get(key) is not None]
    if not keys:
        return []
    if len(keys) == 2:
        raise RecordError(kind, f"stands beside {keys[0]!r}; keep one of the two")
    key, value = keys[0], record[keys[0]]
    if not isinstance(value, list) or (key == "video" and _is_frames(value)):
        return [_reference(root, kind, value, key)]
    return [_reference(root, kind, one, f"{key}[{i}]") for i, one in enumerate(value)]


def _is_frames(value: list[Any]) -> bool:
    """Whether a `video` that is a list is one video of pictures rather than several videos."""
    return all(isinstance(one, str) and Path(one).suffix.lower() in PICTURE_SUFFIXES for one in value)


def _fill_placeholders(
    turns: Turns, listed: Mapping[MediaKind, Sequence[MediaRef]], record: Mapping[str, Any], key: str
) -> Turns:
    """Put the listed media in the places of their placeholders."""
    media = [part for _, parts in turns for part in parts if isinstance(part, MediaRef)]
    counts = Counter(ref.kind for ref in media if not ref.path)
    has_videos_only = bool(listed["video"]) and not listed["image"]
    images_are_videos = has_videos_only and counts["image"] > 0 and not counts["video"]  # LLaVA writes <image> for both
    if images_are_videos:
        counts = Counter({"video": counts["image"]})
    if not counts:
        return _place_first(turns, [ref for kind in KINDS for ref in listed[kind]], key)
    for kind in KINDS:
        num_listed = len(listed[kind])
        if counts[kind] != num_listed:
            both = f"{counts[kind]} <{kind}> placeholder(s) in the text but {num_listed} {kind}(s) listed"
            raise RecordError(
                kind if record.get(kind) is not None else f"{kind}s",
                f"{both}; give one for each, or, where <{kind}> is meant as text, typed parts instead of text and "
                f'list: [{{"type": "{kind}", "{kind}": FILE}}, {{"type": "text", "text": ...}}]',
            )
    refs = {kind: iter(listed[kind]) for kind in KINDS}

    def filled(part: str | MediaRef) -> str | MediaRef:
        if isinstance(part, MediaRef) and not part.path:
            return next(refs["video" if images_are_videos else part.kind])
        return part

    return [(role, [filled(part) for part in parts]) for role, parts in turns]


def _place_first(turns: Turns, refs: list[MediaRef], key: str) -> Turns:
    """Put media without any placeholder at the start of the first user's turn, as users of other trainers expect."""
    if not refs:
        return turns
    for role, parts in turns:
        match = PLACEHOLDER.search("".join(part for part in parts if isinstance(part, str)))
        if role == "assistant" and match:
            raise RecordError(
                key,
                f"{match[0]} in an answer and in no user's turn; media belong in the user's turns: write it there, or, "
                "where it is meant as text, write it there too for the medium that is listed",
            )
    inline = sum(isinstance(part, MediaRef) for _, parts in turns for part in parts)
    if inline:
        raise RecordError(refs[0].field, f"{len(refs)} listed and {inline} in typed parts; keep one of the two")
    for role, parts in turns:
        if role == "user":
            parts[:0] = refs
            return turns
    raise RecordError(key, f"has no user turn to hold {short_repr(refs[0].field)}; add one")
