"""What a trained model is asked: files, folders of files and records, as questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.reasoning import split_reasoning
from vft.common.task import Question, narrate, with_prompt
from vft.common.types import Conversation, MediaInfo, MediaKind, MediaRef, Sample
from vft.common.unique import unique_name
from vft.data.file_names import PICTURE_SUFFIXES
from vft.data.formats import llava_video, messages, story
from vft.data.formats.folders import clips_below
from vft.data.media.errors import MediaError
from vft.data.records.files import RECORD_SUFFIXES, read_records
from vft.data.records.foreign_records import ANSWERS, QUESTIONS, Normalizer
from vft.data.records.paths import resolve_media
from vft.data.records.record import TURN_KEYS, RecordError, as_object, record_id, short_repr
from vft.data.records.unread_keys import report_unread_keys
from vft.data.spans import check_spans
from vft.distributed.process_group import environment
from vft.inference.engine import user_question

LEAST_SEGMENT = 0.1
"""Share of a segment below which the end of a video belongs to the segment before it."""
BEFORE_S = 1e-4
"""A segment ends so many seconds before the next one: ranges include both ends, and no frame shall be in two."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why there is no answer."""

    file: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Item:
    """A question to ask, or why a record asks none."""

    id: str
    asked: Question | Failure
    is_record: bool = False
    asks: bool = True
    """False of a record without a question of its own, which is asked the prompt."""
    segment_s: tuple[float, float] | None = None
    """Where the part of the video that is asked about begins and ends."""


def read_items(
    paths: Sequence[Path],
    prompt: str,
    root: Path | None,
    columns: Mapping[str, str] | None = None,
    before: str = "",
    system: str | None = None,
) -> list[Item]:
    """The questions of files, of all videos and pictures below folders, and of files of records, in this order.

    `prompt` is asked where a record asks nothing itself; of a file, `before` stands before it and `system` is the
    system's text, as in the records of training. `root` is where the media of records lie, by default the folder of
    their file; `columns` is what their keys are called, as on a source. Ids differ: of what comes twice the second
    gets a number.

    Raises:
        UserError: a file of records can't be read; there is nothing in a folder.
    """
    seen: dict[str, int] = {}
    items: list[Item] = []

    def ask(name: str, media: list[MediaRef]) -> Question:
        return user_question(name, media, prompt, before, system)

    for path in paths:
        if path.suffix.lower() in RECORD_SUFFIXES and not path.is_dir():
            found = list(
                _records(path, prompt, Normalizer(root or path.parent, columns or {}, needs_answer=False), seen)
            )
        elif path.is_dir():
            found = [_clip(file, path, seen, ask) for file in clips_below(path)]
        else:
            found = [_clip(path, None, seen, ask)]
        if not found:
            what = "videos or pictures" if path.is_dir() else "records"
            raise UserError(f"{path}: holds no {what}; name files, or folders that hold some")
        items += found
    return items


def _clip(
    file: Path, folder: Path | None, seen: dict[str, int], ask: Callable[[str, list[MediaRef]], Question]
) -> Item:
    """A file, which may not lead out of the `folder` in which it was found."""
    name = unique_name(str(file) if str(file).isprintable() else short_repr(str(file)), seen)
    if folder is not None:
        try:
            resolve_media(folder, str(file.relative_to(folder)), "file")
        except RecordError as error:
            return Item(name, Failure(name, "record", f"{name}: {error.message}"))
    # FFmpeg might take a relative name for a protocol's; shown is the one given.
    kind: MediaKind = "image" if file.suffix.lower() in PICTURE_SUFFIXES else "video"
    ref = MediaRef(kind, file.resolve(), member=str(file))
    return Item(name, ask(name, [ref]))


def _records(path: Path, prompt: str, normalizer: Normalizer, seen: dict[str, int]) -> Iterator[Item]:
    unread: list[tuple[str, ...]] = []
    for number, (line, record) in enumerate(read_records(path), 1):
        name, origin, asks = f"{path.stem}-{number}", f"{path}:{line}", True
        asked: Question | Failure
        try:
            record = as_object(record)
            name = record_id(normalizer.rename_columns(record), name)
            asked, passed_over, asks = _question(record, path, normalizer, name, origin, prompt)
            unread.append(passed_over)
        except RecordError as error:
            field = f"{error.field}: " if error.field else ""
            asked = Failure(origin, "record", f"{origin}: {field}{error.message}")
        yield Item(unique_name(name, seen), asked, is_record=True, asks=asks)
    normalizer.check_columns(path)
    if environment().is_main:
        report_unread_keys(str(path), unread)


def _question(
    record: dict[str, Any], path: Path, normalizer: Normalizer, name: str, origin: str, prompt: str
) -> tuple[Question, tuple[str, ...], bool]:
    """What a record asks, read as in training: all before its last answer, which is the reference; `prompt` where it
    asks nothing. Also its keys that are not read, and whether it asks something itself."""
    if isinstance(record.get("video"), str) and record.get("data_source"):
        record = llava_video.locate_video(record, path, normalizer.root)
    if is_story(record):
        record = normalizer.rename(record, path)[0]
        parsed = story.parse(record, normalizer.root)
        told = narrate(Sample(name, parsed.turns, origin, story.facts(record)), prompt)[0]
        asked = replace(told, turns=told.turns[:-1])
        asks = any(turn.role == "user" and turn.text.strip() for turn in parsed.turns)
        return Question(name, asked, (split_reasoning(parsed.turns[-1].text)[1],)), parsed.unread, asks
    references: list[str] = []
    for one in normalizer.normalize(record, path):  # they differ in their answers alone, each of which is right
        parsed = messages.parse(one, normalizer.root, needs_answer=False)
        turns = parsed.turns
        answered = turns[-1].role == "assistant"
        before = turns[:-1] if answered else turns
        if not before or before[-1].role != "user":
            raise RecordError("messages", "the last turn but an answer must be the user's, who asks")
        references += [split_reasoning(turns[-1].text)[1]] if answered else []
    asked = Conversation(name, with_prompt(before, prompt), origin)
    return Question(name, asked, tuple(references)), parsed.unread, asked.turns == before


def is_story(record: Mapping[str, Any]) -> bool:
    """Whether a record is `vft.data.formats.story`'s: it has a `text`, and nothing asked, or what only a story has."""
    has_media = record.get("video") is not None or record.get("images") is not None
    is_told = record.get("segments") is not None or record.get("speech") is not None
    others = (*TURN_KEYS, *ANSWERS[0], *(() if is_told else QUESTIONS))
    return has_media and record.get("text") is not None and all(record.get(key) is None for key in others)


def split(items: Sequence[Item], length_s: float, info: Callable[[MediaRef], MediaInfo]) -> list[Item]:
    """Each question about a video once for every `length_s` seconds of it; others as they are."""
    return [part for item in items for part in _segments(item, length_s, info)]


def _segments(item: Item, length_s: float, info: Callable[[MediaRef], MediaInfo]) -> Iterator[Item]:
    if isinstance(item.asked, Failure) or all(ref.kind != "video" for ref in item.asked.prompt.media):
        yield item
        return
    videos = [ref for ref in item.asked.prompt.media if ref.kind == "video"]
    if len(videos) > 1:
        message = f"{item.asked.prompt.origin}: {len(videos)} videos; segments are of one alone: ask about each"
        yield replace(item, asked=Failure(videos[0].name, "record", message))
        return
    try:
        found = info(videos[0])
        check_spans(item.asked.prompt, info)
    except (MediaError, UserError):  # told when its turn comes
        yield item
        return
    options = videos[0].options
    first_s, last_s = options.video_start or 0.0, min(options.video_end or math.inf, found.duration_s)
    count = max(1, math.ceil((last_s - first_s) / length_s - LEAST_SEGMENT))
    for number in range(count):
        start_s, end_s = first_s + number * length_s, first_s + (number + 1) * length_s
        part = options
        if number:
            part = replace(part, video_start=start_s - BEFORE_S)
        if number < count - 1:
            part = replace(part, video_end=end_s - BEFORE_S)
        asked = _about(item.asked, videos[0], replace(videos[0], options=part))
        yield replace(item, asked=asked, segment_s=(start_s, end_s if number < count - 1 else last_s))


def _about(question: Question, ref: MediaRef, other: MediaRef) -> Question:
    """The question with another medium in the place of `ref`."""
    turns = tuple(
        replace(turn, parts=tuple(other if part is ref else part for part in turn.parts))
        for turn in question.prompt.turns
    )
    return replace(question, prompt=replace(question.prompt, turns=turns))
