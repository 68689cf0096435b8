"""Times that records state, held against the lengths of their videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.clips import make_clip
from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.common.types import MediaInfo
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.data.budget import fault
from vft.data.dataset import load_dataset
from vft.recipes.caption import Caption
from vft.recipes.story import Story

INFO = MediaInfo("video", 84, 112, 100, 10.0, duration_s=10.0)


@pytest.mark.parametrize(
    ("start_s", "end_s", "said"),
    [
        # An end may overrun the video by half a second.
        *((start_s, end_s, "") for start_s, end_s in ((0, 10), (None, 10), (9.9, None), (0.0, 10.5), (9, 10.4))),
        *((start_s, end_s, "") for start_s, end_s in ((3, 3.01), (None, 0.1))),
        (6000, 9000, "6000 to 9000 s is outside the video, which has 100 frames in 10.00 s; they look like millisec"),
        (60, 90, "they look like frame numbers"),
        (0, 60, "they look like frame numbers"),
        (5, 10.6, "5 to 10.6 s is outside the video"),
        (9, 12, "frames in 10.00 s; give seconds"),
        (10, 10.4, "is outside"),
        (11, None, "from 11 s on is outside"),
        (6000, None, "milliseconds"),
        (150.5, 200.5, "frames in 10.00 s; give seconds"),
        (9, 3, "must begin at 0 or later and end after it begins"),
        (3, 3, "end after it begins"),
        (-2, 3, "must begin at 0"),
    ],
)
def test_whether_it_is_in_the_video(start_s: float | None, end_s: float | None, said: str) -> None:
    found = fault(start_s, end_s, INFO)
    assert said in found and bool(said) == bool(found)


def test_other_lengths() -> None:
    """A frame is longer than half a second, the length is unknown, the video is shown up to 4 s."""
    slow = MediaInfo("video", 84, 112, 10, 1.0, duration_s=10.0)
    assert fault(5, 10.9, slow) == "" and fault(5, 11.1, slow)
    assert fault(0, 50, MediaInfo("video", 84, 112)) == ""
    assert fault(1, 4, INFO, 4.0) == "" and "shown up to 4 s" in fault(5, 6, INFO, 4.0)


def config_of(root: Path, format: str, max_bad: float) -> DataConfig:
    """Of the records in `t.jsonl`, about a clip of two seconds."""
    make_clip(root / "a.mp4", range(20), fps=10, size=(56, 56))
    source = SourceConfig(format=format, path="t.jsonl")
    cache = str(root / "cache")
    return DataConfig(root=root, sources=[source], cache_dir=cache, workers=0, max_bad_fraction=max_bad)


def segments(*spans: tuple[float, float]) -> dict[str, Any]:
    told = [{"start_s": start, "end_s": end, "text": f"Part {i}."} for i, (start, end) in enumerate(spans)]
    return {"video": "a.mp4", "text": "It moves.", "segments": told}


@pytest.mark.parametrize(
    ("task", "format", "record", "said"),
    [
        (Story(), "story", segments((0, 1), (1000, 2000)), "video: segment 2: 1000 to 2000 s is outside"),
        (Story(), "story", segments((0, 1), (10, 18)), "frame numbers"),
        (Story(), "story", segments((0, 0.5), (1.2, 1.8)) | {"video_end": 1.0}, "segment 2: 1.2 to 1.8 s is outside"),
        (Story(), "story", {"video": "a.mp4", "text": "x", "start": 3}, "video: from 3 s on is outside"),
        (
            Caption(),
            "messages",
            {"video": "a.mp4", "question": "?", "answer": "x", "start": 1.5, "end": 7},
            "video: 1.5 to 7 s is outside",
        ),
    ],
)
def test_a_bad_record(tmp_path: Path, tiny: Tiny, task: Any, format: Any, record: Any, said: str) -> None:
    """It and all that is made of it is left out as a bad record; good ones stay."""
    good = segments((0, 1), (1, 2.3)) if format == "story" else {**record, "end": 2.2}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (good, record)))
    config = config_of(tmp_path, format, 0.9)
    documents = load_dataset(config, config.sources, task.conversations, tiny.encoder, seed=0)
    (first, *_), errors = formats.read(config.sources[0], config)
    assert not errors and documents.num_samples == len(task.conversations(first))
    assert {item.reason for item in documents.bad} == {"record"}
    assert all(item.message.startswith("t.jsonl:2: ") and said in item.message for item in documents.bad)


def test_the_reason_is_told_where_no_sample_can_be_used(tmp_path: Path, tiny: Tiny) -> None:
    """Whatever share of them may be bad; it is not that there are none."""
    (tmp_path / "t.jsonl").write_text(json.dumps({"video": "a.mp4", "text": "x", "start": 4, "end": 5}))
    config = config_of(tmp_path, "story", 1.0)
    with pytest.raises(UserError, match=r"t\.jsonl: none of 1 samples can be used; the first: t\.jsonl:1: .* outside"):
        load_dataset(config, config.sources, Caption().conversations, tiny.encoder, seed=0)
