"""Records of summaries and stories: what is read, and what is said of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import read_story
from vft.common.types import MediaRef
from vft.data.records.record import Records


def read(tmp_path: Path, *records: Any) -> Records:
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_story(path, tmp_path)


def segment(start_s: Any, end_s: Any, text: Any = "He cuts.") -> dict[str, Any]:
    return {"start_s": start_s, "end_s": end_s, "text": text}


def test_video(tmp_path: Path) -> None:
    segments = [segment(3, 4.5, "b"), segment(0, 41, "a"), segment(0, 2, "c")]
    record = {"id": "x", "video": "v/a.mp4", "text": " A cook. ", "segments": segments, "speech": "Hello.", "year": 1}
    (sample,), bad = read(tmp_path, record)
    assert not bad
    assert (sample.id, sample.origin) == ("x", "s.jsonl:1")
    user, assistant = sample.turns
    assert (user.role, assistant.role) == ("user", "assistant")
    assert user.parts == (MediaRef("video", (tmp_path / "v/a.mp4").resolve(), field="video"),)
    assert assistant.parts == (" A cook. ",)
    assert sample.fields["segments"] == ((0.0, 2.0, "c"), (0.0, 41.0, "a"), (3.0, 4.5, "b"))
    assert sample.fields["speech"] == "Hello." and sample.fields["year"] == 1


def test_speech_in_a_file_of_subtitles(tmp_path: Path) -> None:
    """What is said in the part of the video that is shown."""
    lines = ["\ufeff1", "00:00:00,000 --> 00:00:02,000", "Hello <i>you</i>", "", "2", "00:00:02,000 --> 00:00:04,000"]
    (tmp_path / "a.SRT").write_text("\r\n".join([*lines, "and you.", ""]), encoding="utf-8")
    (tmp_path / "a.vtt").write_text("WEBVTT\n\n00:01.000 --> 00:03.500 align:start\nHi.\n", encoding="utf-8")
    (tmp_path / "b.srt").write_text("no times")
    named = [{"speech": "a.SRT"}, {"speech": "a.SRT", "start": 2}, {"speech": "a.vtt", "end": "0:03"}]
    samples, bad = read(tmp_path, *[{**VIDEO, **one} for one in (*named, {"speech": "b.srt"}, {"speech": "c.srt"})])
    assert [sample.fields["speech"] for sample in samples] == ["Hello you and you.", "and you.", "Hi."]
    assert [one.field for one in bad] == ["speech"] * 2
    assert "no time lines" in bad[0].message and "c.srt: no such file" in bad[1].message


def test_pictures(tmp_path: Path) -> None:
    record = {"images": ["1.jpg", "2.jpg"], "text": "x", "video": None, "segments": None, "speech": None}
    (sample,), bad = read(tmp_path, record)
    assert not bad
    assert sample.turns[0].parts == tuple(
        MediaRef("image", (tmp_path / f"{i + 1}.jpg").resolve(), field=f"images[{i}]") for i in range(2)
    )
    assert sample.id == "s-1" and sample.fields["segments"] == () and sample.fields["speech"] == ""


def test_json_list(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"video": "a.mp4", "text": "x"}] * 2, indent=1))
    samples, _ = read_story(path, tmp_path)
    assert [sample.origin for sample in samples] == ["s.json:2", "s.json:6"]


VIDEO = {"video": "a.mp4", "text": "x"}


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        ({"text": "x"}, "video", "needs either 'video' or 'images'; it has 'text'"),
        ({**VIDEO, "images": ["1.jpg"]}, "video", "it has both"),
        ({"video": ["1.jpg"], "text": "x"}, "video", "a run of pictures goes under 'images'"),
        ({"images": "1.jpg", "text": "x"}, "images", "must be a list"),
        ({"images": [], "text": "x"}, "images", "at least one picture"),
        ({"images": ["1.jpg", 2], "text": "x"}, "images[1]", "2 is of type int"),
        ({"images": ["1.jpg"], "text": "x", "segments": [segment(0, 1)]}, "segments", "no seconds; take them out"),
        ({"image": "1.jpg", "text": "x"}, "image", "did you mean 'images'?"),
        ({"video": "../a.mp4", "text": "x"}, "video", "out of data.root"),
        ({"video": "a.mp4"}, "text", "is missing; the record has 'video'; put the answer under 'text'"),
        ({"video": "a.mp4", "caption": "x"}, "text", "the record has 'video', 'caption'"),
        ({"video": "a.mp4", "text": " "}, "text", "is empty"),
        ({"video": "a.mp4", "text": 3}, "text", "3 is of type int"),
        ({**VIDEO, "segment": []}, "segment", "did you mean 'segments'?"),
        ({**VIDEO, "speech": 5}, "speech", "of type int"),
        ({**VIDEO, "question": 5}, "question", "of type int"),
        ({**VIDEO, "question": "Who?", "prompt": "Where?"}, "prompt", "is another question than 'question'"),
        ({**VIDEO, "segments": {}}, "segments", "must be a list"),
        ({**VIDEO, "segments": ["x"]}, "segments[0]", "must be an object"),
        ({**VIDEO, "segments": [segment(0, 1), segment(2, 2)]}, "segments[1].start_s", "2 is not below end_s = 2"),
        ({**VIDEO, "segments": [segment(-1, 1)]}, "segments[0].start_s", "from 0"),
        ({**VIDEO, "segments": [segment(0, True)]}, "segments[0].end_s", "True must be a number"),
        ({**VIDEO, "segments": [segment(0, 10**400)]}, "segments[0].end_s", "must be a number"),
        ({**VIDEO, "segments": [{"start": 0, "text": "x"}]}, "segments[0].start_s", "has 'start', 'text'"),
        ({**VIDEO, "segments": [segment(0, 1, "")]}, "segments[0].text", "is empty"),
        ({**VIDEO, "segments": [segment(0, 1, None)]}, "segments[0].text", "is missing"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, record: Any, field: str, message: str) -> None:
    samples, bad = read(tmp_path, VIDEO, record)
    assert len(samples) == 1 and len(bad) == 1
    assert (bad[0].origin, bad[0].field) == ("s.jsonl:2", field)
    assert message in bad[0].message and "\n" not in str(bad[0])
