"""Checks the times in a record against the length of its video."""

from __future__ import annotations

from collections.abc import Callable

from vft.common.errors import UserError
from vft.common.types import Conversation, MediaInfo, MediaRef

SLACK_S = 0.5
"""Seconds by which an end may exceed the video (or one frame, if that is longer): annotations are rounded."""


def check_spans(conversation: Conversation, info: Callable[[MediaRef], MediaInfo]) -> None:
    """Raise UserError with both lengths if a trim, or a segment that the record describes, is not in the video.

    Raises:
        MediaError: the medium cannot be used.
    """
    for ref in conversation.media:
        start_s, end_s = ref.options.video_start, ref.options.video_end
        is_trimmed = start_s is not None or end_s is not None
        if ref.kind == "image" or not (is_trimmed or conversation.spans_s):
            continue
        video = info(ref)
        problems = [fault(start_s, end_s, video)] if is_trimmed else []
        for number, (first_s, last_s) in enumerate(conversation.spans_s, 1):
            if problem := fault(first_s, last_s, video, end_s):
                problems.append(f"segment {number}: {problem}")
        for problem in filter(None, problems):
            raise UserError(f"{conversation.origin}: {ref.field or ref.name}: {problem}")


def fault(start_s: float | None, end_s: float | None, info: MediaInfo, shown_s: float | None = None) -> str:
    """What is wrong with the range from `start_s` to `end_s` seconds of a video; empty if nothing is, or if the length
    of the video is unknown. `shown_s` is where the video is cut off, if it is."""
    length_s = info.duration_s
    if length_s <= 0:
        return ""
    if shown_s is not None:
        length_s = min(length_s, shown_s)
    first_s, last_s = start_s or 0.0, length_s if end_s is None else end_s
    span = f"{first_s:g} to {last_s:g} s" if end_s is not None else f"from {first_s:g} s on"
    if first_s < 0 or last_s <= first_s < length_s:
        return f"{span}: must begin at 0 or later and end after it begins"
    if first_s < length_s and last_s <= length_s + slack_s(info):
        return ""
    cut = f", shown up to {shown_s:g} s" if shown_s is not None and shown_s < info.duration_s else ""
    length = f"the video, which has {info.num_frames} frames in {info.duration_s:.2f} s{cut}"
    unit = _unit(first_s, last_s if end_s is not None else first_s, info)
    looks = f"they look like {unit}; " if unit else ""
    return f"{span} is outside {length}; {looks}give seconds from the beginning of the file"


def slack_s(info: MediaInfo) -> float:
    """Seconds by which a range may exceed the video."""
    return max(SLACK_S, 1 / info.fps if info.fps > 0 else 0.0)


def _unit(first: float, last: float, info: MediaInfo) -> str:
    """The unit that times far beyond the end of a video look like; empty if they look like none that we know."""
    if last < 2 * info.duration_s:
        return ""
    if first == int(first) and last == int(last) and last <= info.num_frames:
        return "frame numbers"
    return "milliseconds" if last >= 1000 and last / 1000 <= info.duration_s + slack_s(info) else ""
