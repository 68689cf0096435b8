"""Segments that are not in their video are not trained on, and no converter writes them."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.parity.cases.conftest import Case


def test_milliseconds(case: Callable[[str], Case]) -> None:
    error = case("27_segments_beyond_the_end").look("train.jsonl", format="story").result.error
    assert "train.jsonl:1: video: segment 2: 6000 to 9000 s is outside the video" in error
    assert "10.00 s" in error and "milliseconds" in error


def test_the_converter_keeps_what_is_in_the_video(case: Callable[[str], Case]) -> None:
    """Of two files of that name one is as long as the annotation says."""
    one = case("27_segments_beyond_the_end")
    options = ("--videos", "vids", "--root", "data", "--output", "out/anet.jsonl")
    told = one.run("tools/convert/activitynet_captions.py", "data/anet.json", *options).ok().stdout
    (record,) = map(json.loads, (one.folder / "out/anet.jsonl").read_text().splitlines())
    assert record["video"] == "vids/b/v_abc.mp4"
    assert record["segments"] == [{"start_s": 0, "end_s": 4, "text": "One."}]
    assert "left out 2: segments: not in the video" in told and "left out 1: segments: empty, or end not after" in told
