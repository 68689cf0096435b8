"""What a trained model is asked: files, folders and records as questions, and the frames and pixels that it sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.task import Question, narrate, split_reasoning, with_prompt
from vft.common.types import Conversation, MediaInfo, MediaKind, MediaRef, Sample, Turn
from vft.common.unique import unique_name
from vft.config.data import DataConfig
from vft.config.toml import validated
from vft.data.budget import check_spans
from vft.data.formats import llava_video, messages, story
from vft.data.formats.folders import clips_below
from vft.data.media import timed_text
from vft.data.media.errors import MediaError
from vft.data.records.files import RECORD_SUFFIXES, WORKBOOKS, read_records
from vft.data.records.foreign_records import ANSWERS, QUESTIONS, Normalizer
from vft.data.records.paths import PICTURE_SUFFIXES, resolve_media
from vft.data.records.record import TURN_KEYS, RecordError, as_object, record_id, short_repr
from vft.data.records.unread_keys import report_unread_keys
from vft.distributed.process_group import environment
from vft.inference.engine import Failure

NO_LIMIT_TOKENS = 1 << 20
"""`data.pack_tokens` for a model whose training is unknown: media keep all frames that other limits allow."""
MIN_SEGMENT = 0.1
"""The end of a video that is shorter than this share of a segment belongs to the segment before it."""
GAP_S = 1e-4
"""A segment ends so many seconds before the next one starts: ranges include both ends, and no frame may be in two."""


@dataclass(frozen=True, slots=True)
class Request:
    """A question to ask, or why a record asks none."""

    id: str
    question: Question | Failure
    is_record: bool = False
    asks: bool = True
    """False for a record without a question of its own, which is asked the prompt."""
    segment_s: tuple[float, float] | None = None
    """Start and end of the part of the video that is asked about."""


def user_question(
    id: str, media: Sequence[MediaRef], text: str, before: str = "", system: str | None = None
) -> Question:
    """A question without known answers. `before` stands before the media, `system` in a turn of its own."""
    system_turns = [] if system is None else [Turn("system", (system,))]
    parts: tuple[str | MediaRef, ...] = (before, *media, text) if before else (*media, text)
    return Question(id, Conversation(id, (*system_turns, Turn("user", parts)), id), ())


def read_requests(
    paths: Sequence[Path],
    prompt: str,
    root: Path | None,
    columns: Mapping[str, str] | None = None,
    before: str = "",
    system: str | None = None,
) -> list[Request]:
    """The questions of files, of all videos and pictures below folders, and of files of records, in this order.

    A record that asks nothing itself is asked `prompt`, and so is a file, with `before` before it and the system text
    `system`, as the records of training had them. The media of records lie below `root`, by default the folder of their
    file; `columns` renames their keys, as on a source. The ids differ: a second one of the same name gets a number.

    Raises:
        UserError: a file of records cannot be read, or a folder holds nothing.
    """
    seen: dict[str, int] = {}
    requests: list[Request] = []

    def ask(name: str, media: list[MediaRef]) -> Question:
        return user_question(name, media, prompt, before, system)

    for path in paths:
        if path.suffix.lower() in RECORD_SUFFIXES | WORKBOOKS and not path.is_dir():
            normalizer = Normalizer(root or path.parent, columns or {}, needs_answer=False)
            found = list(_records(path, prompt, normalizer, seen))
        elif path.is_dir():
            found = [_clip(file, path, seen, ask) for file in clips_below(path)]
        else:
            found = [_clip(path, None, seen, ask)]
        if not found:
            what = "videos or pictures" if path.is_dir() else "records"
            raise UserError(f"{path}: holds no {what}; name files, or folders that hold some")
        requests += found
    return requests


def _clip(
    file: Path, folder: Path | None, seen: dict[str, int], ask: Callable[[str, list[MediaRef]], Question]
) -> Request:
    """A file. One that was found in a `folder` may not be a link that leads out of it."""
    name = unique_name(str(file) if str(file).isprintable() else short_repr(str(file)), seen)
    if folder is not None:
        try:
            resolve_media(folder, str(file.relative_to(folder)), "file")
        except RecordError as error:
            return Request(name, Failure(name, "record", f"{name}: {error.message}"))
    # FFmpeg may take a relative name for a protocol's. Messages show the name that was given.
    kind: MediaKind = "image" if file.suffix.lower() in PICTURE_SUFFIXES else "video"
    ref = MediaRef(kind, file.resolve(), member=str(file))
    return Request(name, ask(name, [ref]))


def _records(path: Path, prompt: str, normalizer: Normalizer, seen: dict[str, int]) -> Iterator[Request]:
    unread: list[tuple[str, ...]] = []
    for number, (line, record) in enumerate(read_records(path), 1):
        name, origin, asks = f"{path.stem}-{number}", f"{path}:{line}", True
        question: Question | Failure
        try:
            record = as_object(record)
            name = record_id(normalizer.rename_columns(record), name)
            question, unread_keys, asks = _question(record, path, normalizer, name, origin, prompt)
            unread.append(unread_keys)
        except RecordError as error:
            field = f"{error.field}: " if error.field else ""
            question = Failure(origin, "record", f"{origin}: {field}{error.message}")
        yield Request(unique_name(name, seen), question, is_record=True, asks=asks)
    normalizer.check_columns(path)
    if environment().is_main:
        report_unread_keys(str(path), unread)


def _question(
    record: dict[str, Any], path: Path, normalizer: Normalizer, name: str, origin: str, prompt: str
) -> tuple[Question, tuple[str, ...], bool]:
    """A record's question, read as in training: all before its last answer, which is the reference, or `prompt` if it
    asks nothing. Also the keys that were not read, and whether it asks something itself."""
    if isinstance(record.get("video"), str) and record.get("data_source"):
        record = llava_video.locate_video(record, path, normalizer.root)
    if is_story(record):
        record = normalizer.rename(record, path)[0]
        parsed = story.parse(record, normalizer.root)
        narrated = narrate(Sample(name, parsed.turns, origin, parsed.fields), prompt)[0]
        conversation = replace(narrated, turns=narrated.turns[:-1])
        asks = any(turn.role == "user" and turn.text.strip() for turn in parsed.turns)
        return Question(name, conversation, (split_reasoning(parsed.turns[-1].text)[1],)), parsed.unread, asks
    references: list[str] = []
    for variant in normalizer.normalize(
        record, path
    ):  # variants differ in their answers alone, and each answer is right
        parsed = messages.parse(variant, normalizer.root, needs_answer=False)
        turns = parsed.turns
        answered = turns[-1].role == "assistant"
        before = turns[:-1] if answered else turns
        if not before or before[-1].role != "user":
            raise RecordError("messages", "the last turn but an answer must be the user's, who asks")
        references += [split_reasoning(turns[-1].text)[1]] if answered else []
    conversation = Conversation(name, with_prompt(before, prompt), origin)
    return Question(name, conversation, tuple(references)), parsed.unread, conversation.turns == before


def is_story(record: Mapping[str, Any]) -> bool:
    """Whether a record has the form of `vft.data.formats.story`: a `text`, and no question, or keys that only a story
    has."""
    has_media = record.get("video") is not None or record.get("images") is not None
    is_told = record.get("segments") is not None or record.get("speech") is not None
    others = (*TURN_KEYS, *ANSWERS[0], *(() if is_told else QUESTIONS))
    return has_media and record.get("text") is not None and all(record.get(key) is None for key in others)


def with_labels(requests: Sequence[Request], about: Mapping[str, Any]) -> list[Request]:
    """The requests, with the labels of training (vft.json) as the options of those that ask what training asked."""
    labels, prompt = tuple(about.get("labels", ())), about.get("prompt")

    def labelled(request: Request) -> Request:
        question = request.question
        if isinstance(question, Failure) or question.prompt.turns[-1].parts[-1] != prompt:
            return request
        return replace(request, question=replace(question, prompt=replace(question.prompt, options=labels)))

    return [labelled(request) for request in requests] if labels else list(requests)


def want_texts(requests: Sequence[Request]) -> bool:
    """Whether any of them asks for a text, and not for one of its options."""
    return any(isinstance(one.question, Question) and not one.question.prompt.options for one in requests)


def with_frame_times(request: Request) -> Request:
    """The request with the times of each video's frames as text before it (`data.video.timestamps`)."""
    question = request.question
    if isinstance(question, Failure):
        return request
    return replace(request, question=replace(question, prompt=timed_text.with_frame_times(question.prompt)))


def split(requests: Sequence[Request], length_s: float, info: Callable[[MediaRef], MediaInfo]) -> list[Request]:
    """Each question about a video once for every `length_s` seconds of it; others stay as they are."""
    return [part for request in requests for part in _segments(request, length_s, info)]


def _segments(request: Request, length_s: float, info: Callable[[MediaRef], MediaInfo]) -> Iterator[Request]:
    question = request.question
    if isinstance(question, Failure) or all(ref.kind != "video" for ref in question.prompt.media):
        yield request
        return
    videos = [ref for ref in question.prompt.media if ref.kind == "video"]
    if len(videos) > 1:
        message = f"{question.prompt.origin}: {len(videos)} videos; segments are of one alone: ask about each"
        yield replace(request, question=Failure(videos[0].name, "record", message))
        return
    try:
        video = info(videos[0])
        check_spans(question.prompt, info)
    except (MediaError, UserError):  # the question fails when its turn comes, with this reason
        yield request
        return
    options = videos[0].options
    first_s, last_s = options.video_start or 0.0, min(options.video_end or math.inf, video.duration_s)
    count = max(1, math.ceil((last_s - first_s) / length_s - MIN_SEGMENT))
    for number in range(count):
        start_s, end_s = first_s + number * length_s, first_s + (number + 1) * length_s
        part = options
        if number:
            part = replace(part, video_start=start_s - GAP_S)
        if number < count - 1:
            part = replace(part, video_end=end_s - GAP_S)
        about_part = _about(question, videos[0], replace(videos[0], options=part))
        yield replace(request, question=about_part, segment_s=(start_s, end_s if number < count - 1 else last_s))


def _about(question: Question, ref: MediaRef, other: MediaRef) -> Question:
    """The question with the medium `other` in the place of `ref`."""
    turns = tuple(
        replace(turn, parts=tuple(other if part is ref else part for part in turn.parts))
        for turn in question.prompt.turns
    )
    return replace(question, prompt=replace(question.prompt, turns=turns))


def data_config(about: Mapping[str, Any], limits: Mapping[str, Any], pack_tokens: int | None = None) -> DataConfig:
    """Frames, pixels, length of a row and options of the chat template as `about` (vft.json) records them, unless
    `limits` has other ones.

    `limits` holds `fps`, `frames`, `max_frames` and `max_pixels` of `[data.video]`, None for those not given.
    """
    video = dict(about.get("video", {}))
    given = {key: value for key, value in limits.items() if value is not None}
    if "fps" in given or "frames" in given:
        video = {key: value for key, value in video.items() if key not in ("fps", "frames")}
    video |= given
    if given.keys() & {"fps", "frames", "max_frames"}:
        video["sample_lists"] = True  # or the limits would not hold for videos that are lists of pictures
    max_frames = given.get("max_frames")
    if max_frames is not None:
        video["min_frames"] = min(video.get("min_frames", DataConfig().video.min_frames), max_frames)
        if "frames" in video and "frames" not in given:
            video["frames"] = min(video["frames"], max_frames)
    pack_tokens = pack_tokens or about.get("pack_tokens", NO_LIMIT_TOKENS)
    options = about.get("template_options", {})
    table = {"video": video, "image": about.get("image", {}), "pack_tokens": pack_tokens, "template_options": options}
    return validated(DataConfig, table, "{}; see --fps, --frames, --max-frames, --max-pixels")
