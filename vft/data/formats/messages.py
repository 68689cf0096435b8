"""A user's own records: OpenAI messages, ShareGPT and LLaVA conversations, told apart by their keys.

`messages` holds `role` and `content`, `conversations` holds `from` and `value` (either pair is read in either). Media
stand in typed parts, or in lists (`videos`, `images`, or `video`, `image`) with a `<video>` or `<image>` in the text
for each, in order. In LLaVA's layout, `<image>` stands for the video too, and is on a line of its own. A video may be a
folder of its frames, which is sampled as a file is.

A record without turns has a medium, an answer and mostly a question under keys of its own (see `shapes`); a question
may be missing, the task asks then. Files are JSON, JSONL, CSV, TSV, Parquet or Arrow.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vft.common.reasoning import CLOSE, OPEN
from vft.common.types import MediaKind, MediaOptions, MediaRef, Role, Sample, Turn
from vft.data.formats.media_options import Turns, lay_under, options_of_part
from vft.data.formats.records import (
    PICTURE_SUFFIXES,
    TURN_KEYS,
    BadRecord,
    Parsed,
    RecordError,
    check_text,
    collect,
    names_in,
    resolve_frames,
    resolve_media,
    resolve_path,
    shown,
)
from vft.data.formats.rows import files_of, read_rows
from vft.data.formats.shapes import Shapes
from vft.data.formats.tables import read_classes
from vft.data.formats.unread_keys import MEDIA_KEYS, answer_lists, check_silent, unread

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
KINDS: tuple[MediaKind, ...] = ("image", "video")
PLACEHOLDER = re.compile(r"<(video|image)>")
LINE_PLACEHOLDER = re.compile(r"<(video|image)>\n|\n<(video|image)>\Z|<(video|image)>")
"""LLaVA's placeholder goes with the line break that sets it off from the question."""

FIELDS = frozenset({"id", "system", "speech", "options", "labels", "groups", *MEDIA_KEYS})
"""Keys beside the turns; the last of them are tasks'."""
PART_KINDS: dict[str, MediaKind] = {"video": "video", "image": "image", "video_url": "video", "image_url": "image"}


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where one of the listed media belongs."""

    kind: MediaKind


Part = str | MediaRef | _Slot


@dataclass
class _Listed:
    """The media that a record lists beside its text."""

    key: str = ""
    refs: list[MediaRef] = field(default_factory=list)


def read(path: Path, root: Path, columns: Mapping[str, str] | None = None) -> tuple[list[Sample], list[BadRecord]]:
    """The samples of a file (or of a folder, see `files_of`) and the records that can't be used.

    Media are relative to `root`; `columns` says how keys are called, by their name here. Of records that are a clip and
    its label, all labels are those of `classes.txt` (a name a line) beside the file, else those that occur.

    Raises:
        UserError: the file as a whole can't be read, or no record has a mapped column.
    """
    listed = read_classes(path if path.is_dir() else path.parent)
    shapes = Shapes(root, columns or {}, listed=listed[1] if listed else ())
    samples, bad = collect(files_of(path), lambda record, _: parse(record, root), read_rows, shapes)
    shapes.check_columns(path)
    labels = tuple(shapes.listed or sorted(set(shapes.labels)))
    return [
        replace(sample, fields={**sample.fields, "labels": labels})
        if sample.fields.get("labels") is shapes.labels
        else sample
        for sample in samples
    ], bad


def parse(record: Mapping[str, Any], root: Path, answered: bool = True) -> Parsed:
    """The turns of a record. Without `answered` it needs no answer: a model is to give it.

    Raises:
        RecordError: names the field.
    """
    present = [key for key in TURN_KEYS if record.get(key) is not None]
    if len(present) != 1:
        either = "the record needs either 'messages' or 'conversations'"
        raise RecordError("messages", f"{either}; it has {names_in(record)}")
    key = present[0]
    entries = record[key]
    if not isinstance(entries, list) or not entries:
        raise RecordError(key, f"{shown(entries)} must be a list with at least one message")
    listed = {kind: _list_media(record, kind, root) for kind in KINDS}
    is_llava = key == "conversations" and not any(one.key.endswith("s") for one in listed.values())
    reader = _Reader(root, any(one.refs for one in listed.values()), LINE_PLACEHOLDER if is_llava else PLACEHOLDER)
    read_turns = [reader.turn(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]
    known = FIELDS | {key} | answer_lists(record)
    try:
        filled = _fill(read_turns, listed, key)
    except RecordError:
        # Mostly the medium that a placeholder lacks stands under another key: then that is at fault.
        unread(record, known, [ref for one in listed.values() for ref in one.refs])
        raise
    rest: list[str] = []
    for i, entry in enumerate(entries):
        filled[i : i + 1], used = lay_under(filled[i : i + 1], entry, f"{key}[{i}]")
        refs = [part for part in filled[i][1] if isinstance(part, MediaRef)]
        unknown = unread(entry, MESSAGE_KEYS | used, refs, f"{key}[{i}]", "message")
        rest += [f"{key}[].{name.rpartition('.')[2]}" for name in unknown]
    filled, used = lay_under(filled, record, "")
    refs = [part for _, parts in filled for part in parts if isinstance(part, MediaRef)]
    beside = unread(record, known | used, refs)
    if not refs:
        check_silent(record, beside, root)
    rest += [*reader.unread, *beside]
    return Parsed(_finish(with_system(record, filled), key, answered), tuple(dict.fromkeys(rest)))


def with_system(record: Mapping[str, Any], turns: Turns) -> Turns:
    """The turns behind the record's own `system`. RecordError where they have another one themselves."""
    system = check_text(record.get("system") or "", "system")
    if not system:
        return turns
    for role, parts in turns:
        said = "".join(part for part in parts if isinstance(part, str))
        if role == "system" and said != system:
            raise RecordError(
                "system", f"{shown(system)} stands beside a system turn, {shown(said)}; keep one of the two"
            )
    return turns if turns[0][0] == "system" else [("system", [system]), *turns]


def _finish(turns: Turns, key: str, answered: bool) -> tuple[Turn, ...]:
    """The turns, checked: each says something, and there is an answer to learn."""
    for i, (role, parts) in enumerate(turns):
        if not any(not isinstance(part, str) or part.strip() for part in parts):
            raise RecordError(f"{key}[{i}]", f"the {role}'s turn is empty; give it a text or take it out")
    if answered and not any(role == "assistant" for role, _ in turns):
        raise RecordError(key, "has no assistant turn; add the answer to learn")
    return tuple(Turn(role, tuple(part for part in parts if part != "")) for role, parts in turns)


REASONING = ("reasoning_content", "reasoning")
MESSAGE_KEYS = frozenset({"role", "content", "from", "value", "weight", "loss", *REASONING})


@dataclass(frozen=True)
class _Reader:
    """Reads messages one by one."""

    root: Path
    has_lists: bool
    placeholder: re.Pattern[str]
    unread: list[str] = field(default_factory=list)
    """Keys of parts that were passed over."""

    def turn(self, entry: object, name: str) -> tuple[Role, list[Part]]:
        if not isinstance(entry, dict):
            raise RecordError(name, f"{shown(entry)} must be an object with 'role' and 'content'")
        role_key, content_key = ("role", "content") if "role" in entry else ("from", "value")
        for key in (role_key, content_key):
            if key not in entry:
                raise RecordError(f"{name}.{key}", f"is missing; the message has {names_in(entry)}")
        for key in ("weight", "loss"):  # others' masks of answers
            if entry.get(key) not in (None, 1, True):
                raise RecordError(f"{name}.{key}", f"{shown(entry[key])}: every answer is learnt; split the record")
        said = entry[role_key]
        if not isinstance(said, str) or said not in ROLES:
            raise RecordError(f"{name}.{role_key}", f"unknown role {shown(said)}; allowed are {', '.join(ROLES)}")
        role, content = ROLES[said], entry[content_key]
        parts: list[Part] = _reasoning(entry, role, content, name)
        name = f"{name}.{content_key}"
        if not isinstance(content, list):
            return role, [*parts, *self.text(content, role, name, split=True)]
        # Where a part stands for a medium, texts beside it are texts.
        is_typed = any(isinstance(part, dict) and part.get("type") != "text" for part in content)
        for i, part in enumerate(content):
            parts += self.part(part, role, f"{name}[{i}]", split=self.has_lists and not is_typed)
        return role, parts

    def text(self, value: object, role: Role, name: str, split: bool) -> list[Part]:
        """A text cut at its placeholders; those in an answer are text."""
        text = check_text(value, name)
        if role == "assistant" or not split:
            return [text]
        parts: list[Part] = []
        position = 0
        for match in self.placeholder.finditer(text):
            kind: MediaKind = "video" if "video" in match[0] else "image"
            parts += [text[position : match.start()], _Slot(kind)]
            position = match.end()
        return [*parts, text[position:]]

    def part(self, part: object, role: Role, name: str, split: bool) -> list[Part]:
        """A typed part; texts in it are cut only where media are listed, since others stand in parts themselves."""
        if not isinstance(part, dict):
            raise RecordError(name, f"{shown(part)} must be an object with 'type'")
        part = {key: value for key, value in part.items() if value is not None}  # as `datasets` fills up its columns
        said = part.pop("type", None)
        if said == "text":
            self.unread.extend(
                f"content[].{key.rpartition('.')[2]}" for key in unread(part, {"text"}, (), name, "text")
            )
            return self.text(part.get("text"), role, f"{name}.text", split)
        if not isinstance(said, str) or said not in PART_KINDS:
            near = difflib.get_close_matches(str(said), ("text", "video", "image"), n=1, cutoff=0.4)
            meant = f"; did you mean {near[0]!r}?" if near else "; allowed are text, video, image"
            raise RecordError(f"{name}.type", f"unknown type {shown(said)}{meant}")
        if role == "assistant":
            raise RecordError(name, f"a part of type {said} in an answer; media belong in the user's turns")
        kind = PART_KINDS[said]
        if isinstance(inner := part.get(f"{kind}_url"), dict) and "detail" in inner:  # of OpenAI's requests
            self.unread.append(f"content[].{kind}_url.detail")
            part = {**part, f"{kind}_url": {key: one for key, one in inner.items() if key != "detail"}}
        if not part and self.has_lists:
            return [_Slot(kind)]
        return [_medium(self.root, kind, part, name)]


def _medium(root: Path, kind: MediaKind, part: dict[str, Any], name: str) -> MediaRef:
    """A medium that stands in an object, with options of its own."""
    keys = [key for key in (kind, f"{kind}_url", "path", "url") if part.get(key) is not None]
    if len(keys) != 1:
        raise RecordError(name, f"needs exactly one of {kind!r}, '{kind}_url'; it has {shown(sorted(part))}")
    value = part.pop(keys[0])
    if isinstance(value, dict):  # {"url": ...}, perhaps with options
        inner = {key: one for key, one in value.items() if one is not None}
        if both := part.keys() & inner.keys():
            raise RecordError(f"{name}.{min(both)}", f"stands in {keys[0]!r} too; keep one of the two")
        value = inner.pop("url", None)
        part |= inner
    options = options_of_part(part, kind, isinstance(value, list), name)
    return _reference(root, kind, value, f"{name}.{keys[0]}", options)


def _reasoning(entry: Mapping[str, Any], role: Role, content: object, name: str) -> list[Part]:
    """What the assistant thought before it answered, from the key in which servers (vLLM, DeepSeek's) give it."""
    keys = [key for key in REASONING if entry.get(key) not in (None, "")]
    if not keys:
        return []
    field, thought = f"{name}.{keys[0]}", check_text(entry[keys[0]], f"{name}.{keys[0]}")
    if role != "assistant":
        raise RecordError(field, f"stands in the {role}'s turn; only an answer has reasoning")
    if OPEN in thought or CLOSE in thought or CLOSE in str(content):
        raise RecordError(field, f"stands beside {OPEN} in the text; keep one of the two")
    return [f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n"]


def _reference(
    root: Path,
    kind: MediaKind,
    value: object,
    name: str,
    options: MediaOptions = MediaOptions(),  # noqa: B008
) -> MediaRef:
    if kind == "video" and isinstance(value, list):
        if not value:
            raise RecordError(name, "[] is an empty list of frames; name at least one picture")
        frames = tuple(resolve_media(root, frame, f"{name}[{i}]") for i, frame in enumerate(value))
        return MediaRef(kind, frames, options, name)
    if isinstance(value, dict):
        given = {key: one for key, one in value.items() if one is not None and (key, one) != ("type", kind)}
        return _medium(root, kind, given, name)
    path, mode = resolve_path(root, value, name)
    if kind == "video" and stat.S_ISDIR(mode):
        return MediaRef(kind, resolve_frames(root, str(path), name), options, name, is_folder=True)
    return MediaRef(kind, resolve_media(root, value, name), options, name)


def _list_media(record: Mapping[str, Any], kind: MediaKind, root: Path) -> _Listed:
    """The media under `videos` or `video` (`images`, `image`)."""
    keys = [key for key in (f"{kind}s", kind) if record.get(key) is not None]
    if not keys:
        return _Listed()
    if len(keys) == 2:
        raise RecordError(kind, f"stands beside {keys[0]!r}; keep one of the two")
    key, value = keys[0], record[keys[0]]
    if not isinstance(value, list) or (key == "video" and _is_frames(value)):
        return _Listed(key, [_reference(root, kind, value, key)])
    return _Listed(key, [_reference(root, kind, one, f"{key}[{i}]") for i, one in enumerate(value)])


def _is_frames(value: list[Any]) -> bool:
    """Whether a `video` that is a list is one video of pictures rather than several videos."""
    return all(isinstance(one, str) and Path(one).suffix.lower() in PICTURE_SUFFIXES for one in value)


def _fill(turns: list[tuple[Role, list[Part]]], listed: Mapping[MediaKind, _Listed], key: str) -> Turns:
    """Put the listed media in their places."""
    slots = Counter(part.kind for _, parts in turns for part in parts if isinstance(part, _Slot))
    video_only = bool(listed["video"].refs) and not listed["image"].refs and not slots["video"]
    if video_only and slots["image"]:
        slots = Counter({"video": slots["image"]})
    if not slots:
        return _place_first(turns, [ref for kind in KINDS for ref in listed[kind].refs], key)
    for kind in KINDS:
        count = len(listed[kind].refs)
        if slots[kind] != count:
            wanted = f"{slots[kind]} <{kind}> placeholder(s) in the text but {count} {kind}(s) listed"
            raise RecordError(
                listed[kind].key or f"{kind}s",
                f"{wanted}; give one for each, or, where <{kind}> is meant as text, typed parts instead of text and "
                f'list: [{{"type": "{kind}", "{kind}": FILE}}, {{"type": "text", "text": ...}}]',
            )
    rest = {kind: iter(listed[kind].refs) for kind in KINDS}
    return [
        (
            role,
            [next(rest["video" if video_only else part.kind]) if isinstance(part, _Slot) else part for part in parts],
        )
        for role, parts in turns
    ]


def _place_first(turns: list[tuple[Role, list[Part]]], refs: list[MediaRef], key: str) -> Turns:
    """Media without any placeholder come at the start of the first user's turn, as users of other trainers expect."""
    filled = [(role, [part for part in parts if not isinstance(part, _Slot)]) for role, parts in turns]
    if not refs:
        return filled
    for role, parts in filled:
        found = PLACEHOLDER.search("".join(part for part in parts if isinstance(part, str)))
        if role == "assistant" and found:
            raise RecordError(
                key,
                f"{found[0]} in an answer and in no user's turn; media belong in the user's turns: write it there, or, "
                "where it is meant as text, write it there too for the medium that is listed",
            )
    inline = sum(isinstance(part, MediaRef) for _, parts in filled for part in parts)
    if inline:
        raise RecordError(refs[0].field, f"{len(refs)} listed and {inline} in typed parts; keep one of the two")
    for role, parts in filled:
        if role == "user":
            parts[:0] = refs
            return filled
    raise RecordError(key, f"has no user turn to hold {shown(refs[0].field)}; add one")
