"""A user's own records: OpenAI messages, ShareGPT and LLaVA conversations, told apart by their keys.

`messages` holds `role` and `content`, `conversations` holds `from` and `value` (either pair is read in either). Media
stand in typed parts, or in lists (`videos`, `images`, or `video`, `image`) with a `<video>` or `<image>` in the text
for each, in order. In LLaVA's layout, `<image>` stands for the video too, and is on a line of its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vft.data.sources.records import (
    PICTURE_SUFFIXES,
    BadRecord,
    RecordError,
    check_text,
    collect,
    resolve_media,
    shown,
)
from vft.types import MediaKind, MediaOptions, MediaRef, Role, Sample, Turn

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

OPTIONS: dict[MediaKind, frozenset[str]] = {
    "video": frozenset(option.name for option in fields(MediaOptions)),
    "image": frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width"}),
}
REAL_OPTIONS = frozenset({"fps", "video_start", "video_end", "sample_fps"})


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


def read(path: Path, root: Path) -> tuple[list[Sample], list[BadRecord]]:
    """The samples of one JSON or JSONL file and the records that can't be used; media are relative to `root`.

    Raises:
        UserError: the file as a whole can't be read.
    """
    return collect([(path, path.name)], lambda record, _: parse(record, root))


def parse(record: Mapping[str, Any], root: Path, answered: bool = True) -> tuple[Turn, ...]:
    """The turns of a record. Without `answered` it needs no answer: a model is to give it.

    Raises:
        RecordError: names the field.
    """
    present = [key for key in ("messages", "conversations") if record.get(key) is not None]
    if len(present) != 1:
        found = ", ".join(map(shown, record)) or "no fields"
        raise RecordError("messages", f"the record needs either 'messages' or 'conversations'; it has {found}")
    key = present[0]
    entries = record[key]
    if not isinstance(entries, list) or not entries:
        raise RecordError(key, f"{shown(entries)} must be a list with at least one message")
    listed = {kind: _list_media(record, kind, root) for kind in KINDS}
    is_llava = key == "conversations" and not any(one.key.endswith("s") for one in listed.values())
    reader = _Reader(root, any(one.refs for one in listed.values()), LINE_PLACEHOLDER if is_llava else PLACEHOLDER)
    turns = [reader.turn(entry, f"{key}[{i}]") for i, entry in enumerate(entries)]
    system = check_text(record.get("system") or "", "system")
    if system and turns[0][0] != "system":
        turns.insert(0, ("system", [system]))
    return _finish(_fill(turns, listed, key), key, answered)


def _finish(turns: list[tuple[Role, list[str | MediaRef]]], key: str, answered: bool) -> tuple[Turn, ...]:
    """The turns, checked: each says something, and there is an answer to learn."""
    for i, (role, parts) in enumerate(turns):
        if not any(not isinstance(part, str) or part.strip() for part in parts):
            raise RecordError(f"{key}[{i}]", f"the {role}'s turn is empty; give it a text or take it out")
    if answered and not any(role == "assistant" for role, _ in turns):
        raise RecordError(key, "has no assistant turn; add the answer to learn")
    return tuple(Turn(role, tuple(part for part in parts if part != "")) for role, parts in turns)


@dataclass(frozen=True)
class _Reader:
    """Reads messages one by one."""

    root: Path
    has_lists: bool
    placeholder: re.Pattern[str]

    def turn(self, entry: object, name: str) -> tuple[Role, list[Part]]:
        if not isinstance(entry, dict):
            raise RecordError(name, f"{shown(entry)} must be an object with 'role' and 'content'")
        role_key, content_key = ("role", "content") if "role" in entry else ("from", "value")
        for key in (role_key, content_key):
            if key not in entry:
                found = ", ".join(map(shown, entry)) or "no fields"
                raise RecordError(f"{name}.{key}", f"is missing; the message has {found}")
        for key in ("weight", "loss"):  # others' masks of answers
            if entry.get(key) not in (None, 1, True):
                raise RecordError(f"{name}.{key}", f"{shown(entry[key])}: every answer is learnt; split the record")
        said = entry[role_key]
        if not isinstance(said, str) or said not in ROLES:
            raise RecordError(f"{name}.{role_key}", f"unknown role {shown(said)}; allowed are {', '.join(ROLES)}")
        role, content, name = ROLES[said], entry[content_key], f"{name}.{content_key}"
        if not isinstance(content, list):
            return role, self.text(content, role, name, split=True)
        parts: list[Part] = []
        for i, part in enumerate(content):
            parts += self.part(part, role, f"{name}[{i}]")
        return role, parts

    def text(self, value: object, role: Role, name: str, split: bool) -> list[Part]:
        """A text cut at its placeholders."""
        text = check_text(value, name)
        if role == "assistant":
            if self.has_lists and (found := PLACEHOLDER.search(text)):
                raise RecordError(name, f"{found[0]} in an answer; media belong in the user's turns")
            return [text]
        if not split:
            return [text]
        parts: list[Part] = []
        position = 0
        for match in self.placeholder.finditer(text):
            kind: MediaKind = "video" if "video" in match[0] else "image"
            parts += [text[position : match.start()], _Slot(kind)]
            position = match.end()
        return [*parts, text[position:]]

    def part(self, part: object, role: Role, name: str) -> list[Part]:
        """A typed part; texts in it are cut only where media are listed, since others stand in parts themselves."""
        if not isinstance(part, dict):
            raise RecordError(name, f"{shown(part)} must be an object with 'type'")
        part = {key: value for key, value in part.items() if value is not None}  # as `datasets` fills up its columns
        said = part.pop("type", None)
        if said == "text":
            return self.text(part.get("text"), role, f"{name}.text", split=self.has_lists)
        if said not in ("video", "image", "video_url", "image_url"):
            raise RecordError(f"{name}.type", f"unknown type {shown(said)}; allowed are text, video, image")
        kind: MediaKind = "video" if said.startswith("video") else "image"
        if role == "assistant":
            raise RecordError(name, f"a part of type {said} in an answer; media belong in the user's turns")
        keys = [key for key in (kind, f"{kind}_url", "path", "url") if key in part]
        if not keys and not part and self.has_lists:
            return [_Slot(kind)]
        if len(keys) != 1:
            raise RecordError(name, f"needs exactly one of {kind!r}, '{kind}_url'; it has {shown(sorted(part))}")
        value = part.pop(keys[0])
        if isinstance(value, dict):
            value = value.get("url")
        options = _options(part, kind, isinstance(value, list), name)
        return [_reference(self.root, kind, value, f"{name}.{keys[0]}", options)]


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
    return MediaRef(kind, resolve_media(root, value, name), options, name)


def _list_media(record: Mapping[str, Any], kind: MediaKind, root: Path) -> _Listed:
    """The media under `videos` or `video` (`images`, `image`)."""
    keys = [key for key in (f"{kind}s", kind) if record.get(key) is not None]
    if not keys:
        return _Listed()
    if len(keys) == 2:
        raise RecordError(kind, f"stands beside {keys[0]!r}; keep one of the two")
    key, value = keys[0], record[keys[0]]
    if key == "video" and _is_frames(value):
        return _Listed(key, [_reference(root, kind, value, key)])
    if not isinstance(value, list):
        return _Listed(key, [_reference(root, kind, value, key)])
    return _Listed(key, [_reference(root, kind, one, f"{key}[{i}]") for i, one in enumerate(value)])


def _is_frames(value: object) -> bool:
    """Whether a `video` that is a list is one video of pictures rather than several videos."""
    return isinstance(value, list) and all(
        isinstance(one, str) and Path(one).suffix.lower() in PICTURE_SUFFIXES for one in value
    )


def _fill(
    turns: list[tuple[Role, list[Part]]], listed: Mapping[MediaKind, _Listed], key: str
) -> list[tuple[Role, list[str | MediaRef]]]:
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
            raise RecordError(listed[kind].key or f"{kind}s", f"{wanted}; give one for each")
    rest = {kind: iter(listed[kind].refs) for kind in KINDS}
    return [
        (
            role,
            [next(rest["video" if video_only else part.kind]) if isinstance(part, _Slot) else part for part in parts],
        )
        for role, parts in turns
    ]


def _place_first(
    turns: list[tuple[Role, list[Part]]], refs: list[MediaRef], key: str
) -> list[tuple[Role, list[str | MediaRef]]]:
    """Media without any placeholder come at the start of the first user's turn, as users of other trainers expect."""
    filled = [(role, [part for part in parts if not isinstance(part, _Slot)]) for role, parts in turns]
    if not refs:
        return filled
    inline = sum(isinstance(part, MediaRef) for _, parts in filled for part in parts)
    if inline:
        raise RecordError(refs[0].field, f"{len(refs)} listed and {inline} in typed parts; keep one of the two")
    for role, parts in filled:
        if role == "user":
            parts[:0] = refs
            return filled
    raise RecordError(key, f"has no user turn to hold {shown(refs[0].field)}; add one")


# ---------------------------------------------------------------------------------------------------------- options


def _options(part: Mapping[str, Any], kind: MediaKind, is_list: bool, name: str) -> MediaOptions:
    """The per-medium keys of qwen-vl-utils, checked."""
    allowed = OPTIONS[kind] if is_list else OPTIONS[kind] - {"sample_fps"}
    for key, value in part.items():
        if key not in allowed:
            raise RecordError(f"{name}.{key}", f"unknown key; allowed are {', '.join(sorted(allowed))}")
        at_least = 0 if key == "video_start" else 1e-6 if key in REAL_OPTIONS else 1
        if not _is_number(value, whole=key not in REAL_OPTIONS) or value < at_least:
            what = "a number" if key in REAL_OPTIONS else "a whole number"
            raise RecordError(f"{name}.{key}", f"{shown(value)} must be {what} of at least {at_least:g}")
    for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels"), ("video_start", "video_end")):
        if low in part and high in part and part[low] > part[high]:
            raise RecordError(f"{name}.{low}", f"{part[low]} is above {high} = {part[high]}; exchange them")
    if "fps" in part and "nframes" in part:
        raise RecordError(
            f"{name}.nframes", f"{part['nframes']} stands beside fps = {part['fps']}; keep one of the two"
        )
    if ("resized_height" in part) != ("resized_width" in part):
        raise RecordError(f"{name}.resized_height", "goes with resized_width; give both or neither")
    return MediaOptions(**part)


def _is_number(value: Any, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**53
