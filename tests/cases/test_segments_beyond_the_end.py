"""Segments that are not in their video are not trained on."""

from __future__ import annotations

from collections.abc import Callable

from tests.cases.conftest import Case


def test_milliseconds(case: Callable[[str], Case]) -> None:
    error = case("27_segments_beyond_the_end").look("train.jsonl", format="story").result.error
    assert "train.jsonl:1: video: segment 2: 6000 to 9000 s is outside the video" in error
    assert "10.00 s" in error and "milliseconds" in error
