"""When things happen, as text: the answers that models learn to give, and what is read from those that they gave.

The forms are those in which the released models answer in their own cookbooks (`cookbooks/video_understanding.ipynb`
of QwenLM/Qwen2.5-VL, February 2025, and of QwenLM/Qwen3-VL). By their reports both were trained with seconds and clock
times.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Span = tuple[float, float]
"""Start and end in seconds of the video."""
Event = tuple[float, float, str]
"""Start, end, and what happens; an empty text if that is not said."""
EventForm = Literal["qwen2_5_vl", "qwen3_vl", "seconds"]

_START = ("start_time", "start", "start_s", "begin", "from")
_END = ("end_time", "end", "end_s", "stop", "to")
_BOTH = ("timestamp", "timestamps", "time", "times", "span", "segment", "window", "time_range")
_TEXT = ("description", "caption", "sentence", "text", "event", "label", "query", "activity")
_CLOCK = r"(?:[0-9]+:)?[0-9]{1,3}:[0-9]{1,2}(?:\.[0-9]+)?"
_TIME = rf"({_CLOCK}|[0-9]+(?:\.[0-9]+)?)(\s*s(?:ec(?:ond)?s?)?\b)?"
_RANGE = re.compile(rf"(?<![\w.:]){_TIME}\s*(?:-|–|—|~|\b(?:to|until|and)\b)+\s*(?:the\s+)?{_TIME}", re.IGNORECASE)
_SINGLE = re.compile(
    rf"(\b(?:start|begin|end|stop|from|until)[a-z]*\b[^0-9\n]{{0,24}})?(?<![\w.:]){_TIME}", re.IGNORECASE
)
_MARKS = " \t\r,.;:|*\"'()[]{}<>-–—"


def write_moment(spans: Sequence[Span], form: EventForm = "qwen2_5_vl") -> str:
    """The answer to when something happens, in seconds to a hundredth at most: the sentence of Qwen2.5-VL's cookbook
    for either family, or with `seconds` the spans alone."""
    told = [tuple(str(round(float(time_s), 2)) for time_s in span) for span in spans]
    if form == "seconds":
        return ", ".join(f"{start} to {end}" for start, end in told) + " s"
    return f"The given query happens in {', '.join(f'{start} - {end}' for start, end in told)} seconds."


def write_events(events: Sequence[Event], form: EventForm = "qwen2_5_vl") -> str:
    """All events of a video. `qwen2_5_vl`: a JSON list in a fence; `qwen3_vl`: a JSON object of spans and texts, both
    with mm:ss.ff; `seconds`: a line for each event."""
    if form == "seconds":
        return "\n".join(f"{write_moment([(start, end)], form)}: {text}" for start, end, text in events)
    timed = [(_clock(start), _clock(end), text) for start, end, text in events]
    if form == "qwen3_vl":  # by hand, since several events may have the same span
        lines = (f"    {json.dumps(f'{a} - {b}')}: {json.dumps(text, ensure_ascii=False)}" for a, b, text in timed)
        return "{\n" + ",\n".join(lines) + "\n}"
    listed = [dict(zip((_START[0], _END[0], _TEXT[0]), event, strict=True)) for event in timed]
    return f"```json\n{json.dumps(listed, indent=4, ensure_ascii=False)}\n```"


def _clock(time_s: float) -> str:
    hundredths = round(time_s * 100)
    return f"{hundredths // 6000:02d}:{hundredths // 100 % 60:02d}.{hundredths % 100:02d}"


def read_events(text: str) -> list[Event]:
    """The spans that an answer names, in its order, each with what the answer says about it.

    Read are JSON (lists and objects of many shapes), a span at the start of a line with a text behind it, spans
    anywhere (`X - Y`, `from X to Y`), and else single times in pairs. A time is in seconds, or mm:ss or hh:mm:ss with
    a fraction. Beside spans with a unit, colon or fraction, whole numbers (`2 - 3 people`) are no spans. A span whose
    end comes first is turned round; a lone time is a span without length. An end after that of the video stays, as in
    public scorers.
    """
    return _in_json(text) or _in_lines(text) or _in_pairs(text)


def _in_lines(text: str) -> list[Event]:
    found: list[tuple[bool, Event]] = []
    for line in text.splitlines():
        matches, is_sure, row = list(_RANGE.finditer(line)), False, []
        for match, after in zip(reversed(matches), (None, *reversed(matches)), strict=False):
            opens_line = len(matches) == 1 and not line[: match.start()].strip(_MARKS + "•0123456789")
            says = line[match.end() :].strip(_MARKS) if opens_line else ""
            # The unit of several spans is often behind the last one.
            is_sure &= after is not None and line[match.end() : after.start()].strip(_MARKS) in ("", "and")
            is_sure |= any(
                ":" in one or "." in one or bool(unit) for one, unit in (match.groups()[:2], match.groups()[2:])
            )
            if span := _span(match[1], match[3]):
                row.append((is_sure, (*span, says)))
        found += reversed(row)
    return [event for is_sure, event in found if is_sure or not any(sure for sure, _ in found)]


def _in_pairs(text: str) -> list[Event]:
    times = [match[2] for match in _SINGLE.finditer(text) if match[1] or match[3] or ":" in match[2]]
    pairs = zip(times[::2], times[1::2] or times[:1], strict=False)
    return [(*span, "") for pair in pairs if (span := _span(*pair))]


def _in_json(text: str) -> list[Event]:
    match = re.search(r"[\[{].*[\]}]", text, re.DOTALL)
    found = match[0] if match else ""
    for closing in ("", "]"):  # the last objects of a list may be cut off
        try:
            # An object becomes a tuple of pairs: it may have a key twice.
            return list(_events(json.loads(f"{found}{closing}", object_pairs_hook=tuple)))
        except (ValueError, RecursionError, OverflowError):  # also brackets in a sentence
            continue
    return []


def _events(value: Any) -> Iterator[Event]:
    """The events in a JSON value, whose objects are tuples of pairs."""
    if isinstance(value, tuple):
        fields = {str(key).lower(): one for key, one in value}
        start, end, both, text = (next((fields[k] for k in keys if k in fields), None) for keys in _KEYS)
        span = _span(start, end) or _whole(both)
        if span:
            yield (*span, text if isinstance(text, str) else "")
            return
        for key, inner in value:
            if (span := _whole(key)) and isinstance(inner, str):
                yield (*span, inner)
            else:
                yield from _events(inner)
    elif span := _whole(value):
        yield (*span, "")
    elif isinstance(value, list):
        for inner in value:
            yield from _events(inner)


_KEYS = (_START, _END, _BOTH, _TEXT)


def _whole(value: Any) -> Span | None:
    """A pair of times, or a text that is a span and nothing else."""
    if isinstance(value, str) and (match := _RANGE.fullmatch(value.strip())):
        return _span(match[1], match[3])
    return _span(*value) if isinstance(value, list) and len(value) == 2 else None


def _span(start: Any, end: Any) -> Span | None:
    times = [_time(one) for one in (start, end)]
    return (min(times), max(times)) if all(map(math.isfinite, times)) else None


def _time(value: Any) -> float:
    """Seconds; NaN if the value is no time."""
    if isinstance(value, str) and (match := re.fullmatch(_TIME, value.strip(), re.IGNORECASE)):
        return sum(float(part) * 60**i for i, part in enumerate(reversed(match[1].split(":"))))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
