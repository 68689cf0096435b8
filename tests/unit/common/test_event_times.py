"""Times in texts: what is written for each family, and what is read from answers of any form."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from vft.common.event_times import Event, EventForm, read_events, write_events, write_moment

LIST = [
    {"start_time": "00:00.00", "end_time": "00:21.80", "description": "He slices meat."},
    {"start_time": "00:23.90", "end_time": "01:35.60", "description": "He cuts 2 - 3 pieces."},
]
EVENTS = [(0.0, 21.8, "He slices meat."), (23.9, 95.6, "He cuts 2 - 3 pieces.")]
TWO = [(0.0, 6.9, ""), (8.0, 9.0, "")]


@pytest.mark.parametrize(
    ("answer", "events"),
    [
        ("The given query happens in 64.0 - 72.0 seconds.", [(64.0, 72.0, "")]),
        ("The event happens in 12.3 to 20.1 seconds", [(12.3, 20.1, "")]),
        ("The event 'person turn a light on' happens in the 24.3 - 30.4 seonds.", [(24.3, 30.4, "")]),
        ("from 0:05 to 1:10", [(5.0, 70.0, "")]),
        ("00:05.50–00:10.25", [(5.5, 10.25, "")]),
        ("1:02:03.5 — 1:02:10", [(3723.5, 3730.0, "")]),
        ("From 3 s until 9 s.", [(3.0, 9.0, "")]),
        ("Between 3 and 9 seconds", [(3.0, 9.0, "")]),
        ("10 seconds to the 15 seconds", [(10.0, 15.0, "")]),
        ("12.5s-17s", [(12.5, 17.0, "")]),
        ("<answer>12.54 to 17.83</answer>", [(12.54, 17.83, "")]),
        ("<3.0 seconds> - <5.0 seconds>", [(3.0, 5.0, "")]),
        ("20 - 10", [(10.0, 20.0, "")]),
        ("5 - 99999 seconds", [(5.0, 99999.0, "")]),
        ("0.0 - 6.9, 8.0 - 9.0 seconds", TWO),
        ("0 - 6.9 and 8 - 9 seconds", TWO),
        ("In 0.0 - 6.9 seconds, then again in 8.0 - 9.0 seconds.", TWO),
        ("3-4 people come in at 5.0 s - 9.0 s", [(5.0, 9.0, "")]),
        ("Starting time: 0.8 seconds\nEnding time: 1.1 seconds", [(0.8, 1.1, "")]),
        ("The start time for this event is 0 seconds, and the end time is 12 seconds.", [(0.0, 12.0, "")]),
        ("It starts at 0:05 and ends at 0:12", [(5.0, 12.0, "")]),
        ("start: 3, end: 5", [(3.0, 5.0, "")]),
        ("at 5 seconds", [(5.0, 5.0, "")]),
        ("[12.3, 20.1]", [(12.3, 20.1, "")]),
        ("It happens in [1, 2].", [(1.0, 2.0, "")]),
        ('["0:05", "0:10"]', [(5.0, 10.0, "")]),
        ("[[0, 6.9], [9, 8]]", TWO),
        ('{"start": 1.5, "end": "00:03.00"}', [(1.5, 3.0, "")]),
        ('{"timestamps": [[0, 6.9], [8, 9]]}', TWO),
        ('{"events": [{"timestamp": "0:01 - 0:02", "caption": "q"}]}', [(1.0, 2.0, "q")]),
        ("The events:\n```json\n" + json.dumps(LIST) + "\n```", EVENTS),
        (json.dumps(LIST)[:-30], EVENTS[:1]),
        (json.dumps(LIST)[:-1], EVENTS),
        ('{\n"0:00 - 0:02": "a",\n"0:00 - 0:02": "b"\n}', [(0.0, 2.0, "a"), (0.0, 2.0, "b")]),
        ('{\n"0:00 - 0:02": "a",\n"0:03 - 0:0', [(0.0, 2.0, "a"), (0.0, 3.0, "")]),
        ("0.0 - 5.0 seconds, a dog runs.\n6 - 7.5 seconds, it sleeps.", [(0, 5, "a dog runs"), (6, 7.5, "it sleeps")]),
        ("1. 0:05 - 0:10: A man\n2. 0:10 - 0:12: A dog", [(5, 10, "A man"), (10, 12, "A dog")]),
        ("- **0:05 - 0:10** A man", [(5, 10, "A man")]),
        *((text, []) for text in ("", "No such thing.", "2 dogs", "[x]", "{", "[1e999, 2]", "true", "[true, 3]")),
        ("9" * 400 + " - 3", []),
        ("[" * 100_000 + "]" * 100_000, []),
        ("[" + "9" * 4000 + ", 2]", []),
    ],
)
def test_read(answer: str, events: list[Event]) -> None:
    assert read_events(answer) == events


def test_moments_are_written_as_in_the_cookbook() -> None:
    assert write_moment([(64, 72)]) == "The given query happens in 64.0 - 72.0 seconds."
    assert write_moment([(0.28, 55.15), (60.5, 61)]) == "The given query happens in 0.28 - 55.15, 60.5 - 61.0 seconds."
    assert write_moment([(0, 6.9), (8, 9)], "seconds") == "0.0 to 6.9, 8.0 to 9.0 s"
    assert all(read_events(write_moment([(0, 6.9), (8, 9)], form)) == TWO for form in get_args(EventForm))


def test_events_are_written_as_each_family_writes_them() -> None:
    assert write_events(EVENTS, "qwen2_5_vl") == "```json\n" + json.dumps(LIST, indent=4) + "\n```"
    third = '{\n    "00:00.00 - 00:21.80": "He slices meat.",\n    "00:23.90 - 01:35.60": "He cuts 2 - 3 pieces."\n}'
    assert write_events(EVENTS, "qwen3_vl") == third
    assert write_events(EVENTS, "seconds").splitlines()[1] == "23.9 to 95.6 s: He cuts 2 - 3 pieces."


@pytest.mark.parametrize("form", get_args(EventForm))
def test_what_is_written_is_read(form: EventForm) -> None:
    events = [(0.0, 21.8, 'A "q" dog'), (3599.99, 3723.46, "é, b: c"), (3599.99, 3723.46, "also")]
    assert read_events(write_events(events, form)) == events
