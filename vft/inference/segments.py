"""A question about a long video as questions about its parts (`vft predict --segments SECONDS`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from vft.common.errors import UserError
from vft.common.task import Question
from vft.common.types import MediaInfo, MediaRef
from vft.data.budget import check_spans
from vft.data.media.errors import MediaError
from vft.inference.engine import Failure
from vft.inference.requests import Request

MIN_SEGMENT = 0.1
"""The end of a video that is shorter than this share of a segment belongs to the segment before it."""
GAP_S = 1e-4
"""A segment ends so many seconds before the next one starts: ranges include both ends, and no frame may be in two."""


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
