"""A trim, a rate or a number of frames beside the videos is about them, whatever the form of the record."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.parity.cases.conftest import Case


@pytest.mark.parametrize(
    ("records", "format"),
    [("train.jsonl", "messages"), ("llava.jsonl", "messages"), ("nested.jsonl", "messages"), ("story.jsonl", "story")],
)
def test_the_part_from_6_to_9_seconds(case: Callable[[str], Case], records: str, format: str) -> None:
    """Grey is 20 + 2 a frame, of ten frames a second."""
    task = ("task=story",) if format == "story" else ()
    look = case("03_trim_keys_beside_videos").look(records, *task, format=format)
    look.result.ok()
    times_s = look.frame_times()
    assert times_s[0] == 6.0 and times_s[-1] == 9.0 and len(times_s) == 6
    assert look.greys() == pytest.approx([20 + 20 * time_s for time_s in times_s], abs=2)


def test_half_a_frame_a_second(case: Callable[[str], Case]) -> None:
    look = case("03_trim_keys_beside_videos").look("fps.jsonl")
    look.result.ok()
    assert len(look.frame_times()) == 4
