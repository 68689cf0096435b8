"""Keys of records: those that say how media are shown, those that name media where nobody looks, and all others."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import error_of, read_messages, read_source, sample_of, write
from vft.common.types import MediaOptions, MediaRef
from vft.data.records import unread_keys
from vft.data.records.record import BadRecord, Records
from vft.inference.engine import Failure
from vft.inference.requests import read_requests

ANSWER = {"role": "assistant", "content": "A cat."}
TRIM = {"video_start": 6.0, "video_end": 9.0}
SHOWN = MediaOptions(video_start=6.0, video_end=9.0)


def read(root: Path, format: str, *records: Any) -> Records:
    return read_source(format, write(root / "train.json", records), root)


def options_of(root: Path, record: Any, format: str = "messages") -> list[MediaOptions]:
    """Of each medium, in reading order."""
    records = read(root, format, record)
    return [part.options for turn in sample_of(records).turns for part in turn.parts if isinstance(part, MediaRef)]


def fail(root: Path, record: Any, format: str = "messages") -> BadRecord:
    return error_of(read(root, format, record))


def asked(text: Any = "<video>What?", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, ANSWER], **more}


def llava(**more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    return {"id": "a", "conversations": turns, **more}


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("messages", asked(videos=["a.mp4"], **TRIM)),
        ("messages", asked(video="a.mp4", **TRIM)),
        ("messages", asked(videos=[{"video": "a.mp4", **TRIM}])),
        ("messages", asked(videos=[{"type": "video", "path": "a.mp4", **TRIM}])),
        ("messages", asked([{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}], **TRIM)),
        ("messages", asked([{"type": "video", "video": "a.mp4", **TRIM}, {"type": "text", "text": "What?"}])),
        ("messages", {"messages": [{"role": "user", "content": "<video>?", **TRIM}, ANSWER], "videos": ["a.mp4"]}),
        ("messages", asked([{"type": "video_url", "video_url": {"url": "a.mp4", **TRIM}}])),
        ("messages", asked([{"type": "video", "video": {"url": "a.mp4"}, **TRIM}])),
        ("messages", asked([{"type": "video", "video": {"url": "a.mp4", "start": 6}, "end": 9}])),
        ("messages", llava(video="a.mp4", **TRIM)),
        ("messages", {"video": "a.mp4", "question": "What?", "answer": "A cat.", **TRIM}),
        ("llava_video", llava(video="a.mp4", **TRIM)),
        ("llava_instruct", llava(image=None, video="a.mp4", **TRIM)),
        ("story", {"video": "a.mp4", "text": "A cat.", **TRIM}),
    ],
)
def test_a_trim_is_read_wherever_it_stands(tmp_path: Path, format: str, record: Any) -> None:
    assert options_of(tmp_path, record, format) == [SHOWN]


@pytest.mark.parametrize(
    "keys",
    [
        {"start": 6, "end": 9},
        {"start_s": 6, "end_s": 9},
        {"start_time": 6, "end_time": 9},
        {"startTime": 6, "endTime": 9},
        {"clip_start": 6, "clip_end": 9},
        {"start_sec": 6, "end_sec": 9},
        {"begin": 6, "end": 9},
        {"video-start": 6, "video-end": 9},
        {"start_ms": 6000, "end_ms": 9000},
        {"start": "0:06", "end": "00:00:09,0"},
        {"begin_time": 6, "finish_time": 9},
        {"t_start": 6, "stop_time": 9},
        {"trim": [6, 9]},
        {"video_start": [6], "video_end": [9]},
        {"trim": [[6, 9]]},
        {"start": 6, "video_start": 6.0, "end": 9},
    ],
)
@pytest.mark.parametrize("place", ["record", "object"])
def test_other_spellings(tmp_path: Path, keys: dict[str, Any], place: str) -> None:
    if place == "object" and any(isinstance(one, list) for one in keys.values()) and keys != {"trim": [6, 9]}:
        return  # a list for each medium is the record's
    record = asked(videos=["a.mp4"], **keys) if place == "record" else asked(videos=[{"path": "a.mp4", **keys}])
    assert options_of(tmp_path, record) == [SHOWN]


def test_each_option_is_read(tmp_path: Path) -> None:
    keys = {"min_frames": 2, "max_frames": 8, "min_pixels": 784, "max_pixels": 7840, "total_pixels": 78400}
    keys |= {"resized_height": 56, "resized_width": 84}
    for rate in ({"fps": 0.5}, {"nframes": 6}):
        assert options_of(tmp_path, asked(videos=["a.mp4"], **keys, **rate)) == [MediaOptions(**keys, **rate)]
    frames = asked(videos=[["1.jpg", "2.jpg"]], sample_fps=4)
    assert options_of(tmp_path, frames) == [MediaOptions(sample_fps=4)]
    times = asked(videos=[["1.jpg", "2.jpg"]], timestamps=[0, 2.5])
    assert options_of(tmp_path, times) == [MediaOptions(timestamps=(0.0, 2.5))]
    assert options_of(tmp_path, asked("<image>?", images=["1.jpg"], maxPixels=7840)) == [MediaOptions(max_pixels=7840)]


def test_several_media(tmp_path: Path) -> None:
    """One value is for all, a list one for each in reading order; pictures take what is pictures'."""
    two = asked("<video>and<video>?", videos=["a.mp4", "b.mp4"], video_start=[1, None], video_end=[3, 4], fps=2)
    assert options_of(tmp_path, two) == [
        MediaOptions(fps=2, video_start=1, video_end=3),
        MediaOptions(fps=2, video_end=4),
    ]
    mixed = asked("<image><video>?", videos=["a.mp4"], images=["1.jpg"], max_pixels=784, fps=1.0)
    assert options_of(tmp_path, mixed) == [MediaOptions(max_pixels=784), MediaOptions(max_pixels=784, fps=1.0)]
    pairs = asked("<video>and<video>?", videos=["a.mp4", "b.mp4"], trim=[[1, 3], [2, 4]])
    assert options_of(tmp_path, pairs) == [
        MediaOptions(video_start=1, video_end=3),
        MediaOptions(video_start=2, video_end=4),
    ]


def test_the_nearest_key_counts(tmp_path: Path) -> None:
    part = {"type": "video", "video": "a.mp4", "nframes": 6, "max_pixels": 784}
    record = asked([part, {"type": "text", "text": "?"}], fps=2.0, max_pixels=7840, max_frames=8)
    assert options_of(tmp_path, record) == [MediaOptions(nframes=6, max_pixels=784, max_frames=8)]
    message = {"role": "user", "content": "<video>?", "video_end": 5}
    assert options_of(tmp_path, {"messages": [message, ANSWER], "videos": ["a.mp4"], "video_start": 1, "end": 9}) == [
        MediaOptions(video_start=1, video_end=5)
    ]


@pytest.mark.parametrize(
    ("keys", "field", "message"),
    [
        ({"video_start": "six"}, "video_start", "'six' must be a number"),
        ({"video_start": "6,5"}, "video_start", "'6,5' must be a number of at least 0, such as 90.5 or 1:30.5"),
        ({"video_start": "1:60"}, "video_start", "'1:60' must be a number"),
        ({"start_ms": "0:06"}, "start_ms", "'0:06' must be a number"),
        ({"start": True}, "start", "True must be a number"),
        ({"video_start": -1}, "video_start", "-1 must be a number of at least 0"),
        ({"start": 9, "end": 6}, "start", "9 is above end = 6"),
        ({"start": 6, "end": 6}, "start", "6 is no earlier than end = 6"),
        ({"trim": [9, 6]}, "trim", "9 is above trim = 6"),
        ({"trim": [9]}, "trim", "must be [start, end]"),
        ({"trim": 9}, "trim", "must be [start, end]"),
        ({"start": 5, "video_start": 6}, "video_start", "6 contradicts start = 5"),
        ({"start_frame": 60}, "start_frame", "frame numbers are not read"),
        ({"end_idx": 60}, "end_idx", "frame numbers are not read"),
        ({"fps": 1, "nframes": 4}, "nframes", "4 stands beside fps = 1"),
        ({"nframes": 2.5}, "nframes", "whole number"),
        ({"max_frames": 0}, "max_frames", "at least 1"),
        ({"resized_height": 56}, "resized_height", "goes with resized_width"),
        ({"min_pixels": 10, "max_pixels": 5}, "min_pixels", "above max_pixels = 5"),
        ({"video_start": [1, 2]}, "video_start", "2 values for 1 media"),
        ({"timestamp": [6, 9]}, "timestamp", "say 'video_start' and 'video_end'"),
    ],
)
def test_options_that_cannot_be_met(tmp_path: Path, keys: dict[str, Any], field: str, message: str) -> None:
    for format, record in (
        ("messages", asked(videos=["a.mp4"])),
        ("llava_video", llava(video="a.mp4")),
        ("story", {"video": "a.mp4", "text": "x"}),
    ):
        bad = fail(tmp_path, {**record, **keys}, format)
        assert bad.field == field and message in bad.message, bad


@pytest.mark.parametrize(
    ("times", "field", "message"),
    [
        ([0], "videos[0]", "2 pictures but 1 timestamps"),
        ([2, 1], "timestamps[1]", "1 comes before 2"),
        ([0, "1"], "timestamps", "must be a list of seconds"),
        (3, "timestamps", "must be a list of seconds"),
        ([0, 1e12], "timestamps", "must be a list of seconds"),
        ([7, 7], "timestamps", "all 2 times are 7"),
    ],
)
def test_times_of_pictures(tmp_path: Path, times: Any, field: str, message: str) -> None:
    bad = fail(tmp_path, asked(videos=[["1.jpg", "2.jpg"]], timestamps=times))
    assert bad.field == field and message in bad.message
    part = {"type": "video", "video": ["1.jpg", "2.jpg"], "timestamps": times}
    assert message in fail(tmp_path, asked([part])).message


def test_times_and_a_rate_of_pictures(tmp_path: Path) -> None:
    """Both may stand there where they say the same; what stands with the video goes before what the record says."""
    names = ["1.jpg", "2.jpg"]
    for times, rate in (([0, 0.5], 2), ([4.0, 4.26], 4)):
        options = MediaOptions(sample_fps=rate, timestamps=tuple(map(float, times)))
        assert options_of(tmp_path, asked(videos=[names], timestamps=times, sample_fps=rate)) == [options]
    bad = fail(tmp_path, asked(videos=[names], timestamps=[0, 1.5], sample_fps=2))
    assert bad.field == "sample_fps" and "2 a second contradicts 2 timestamps in 1.5 s" in bad.message
    part = {"type": "video", "video": names, "timestamps": [0, 1.5]}
    assert options_of(tmp_path, asked([part], sample_fps=2)) == [MediaOptions(timestamps=(0.0, 1.5))]


def test_a_part_and_its_record_are_checked_together(tmp_path: Path) -> None:
    bad = fail(tmp_path, asked([{"type": "video", "video": "a.mp4", "video_end": 4}], video_start=6))
    assert bad.field == "video_start" and "6 is above video_end = 4" in bad.message


def test_segments_beside_a_later_start(tmp_path: Path) -> None:
    record = {"video": "a.mp4", "text": "x", "segments": [{"start_s": 1, "end_s": 2, "text": "y"}]}
    assert "shown from 6 s on" in fail(tmp_path, {**record, "start": 6}, "story").message
    assert options_of(tmp_path, {**record, "end": 9}, "story") == [MediaOptions(video_end=9)]


# ----------------------------------------------------------------------------------------- media under unknown keys


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        (asked("?", video_path="c.mp4"), "video_path", "names 'c.mp4' under a key that is not read; the nearest known"),
        (asked("?", vidoes=["c.mp4"]), "vidoes", "one is 'videos'"),
        (asked("?", vidoes=["c10"]), "vidoes", "did you mean 'videos'?"),
        (asked("?", Video="c10"), "Video", "did you mean 'video'?"),
        (asked("?", clip="sub/c.webm"), "clip", "one is 'video"),
        (asked("?", file="https://x.org/c.mp4?token=1"), "file", "one is 'video'"),
        (asked("?", media="data:video/mp4;base64,AAAA"), "media", "one is 'video'"),
        (asked("?", attachments=[{"path": "c.mp4"}]), "attachments", "names 'c.mp4'"),
        (asked("?", picture="p.JPG"), "picture", "one is 'image'"),
        (asked(videos=["a.mp4"], image_path="p.png"), "image_path", "one is 'image'"),
        (asked("?", audios=["a.wav"]), "audios", "no sound is heard"),
        (
            {"messages": [{"role": "user", "content": "?", "videos": ["c.mp4"]}, ANSWER]},
            "messages[0].videos",
            "in a message; the nearest known one is 'videos', beside the messages",
        ),
        (
            {"messages": [{"role": "user", "content": "?", "images": ["p.png"]}, ANSWER]},
            "messages[0].images",
            "one is 'images', beside the messages",
        ),
        (
            {"messages": [{"role": "user", "content": "?", "attachments": [{"path": "c.mp4"}]}, ANSWER]},
            "messages[0].attachments",
            "names 'c.mp4'",
        ),
        (asked([{"type": "text", "text": "?", "video": "c.mp4"}]), "messages[0].content[0].video", "in a text"),
        (asked([{"type": "input_video", "video": "c.mp4"}]), "messages[0].content[0].type", "did you mean 'video'?"),
        (asked([{"type": "file", "file": {"path": "c.mp4"}}]), "messages[0].content[0].type", "unknown type 'file'"),
        (asked([{"type": "video", "vidoe": "c.mp4"}]), "messages[0].content[0]", "needs exactly one of 'video'"),
        (llava(video_path="c.mp4"), "video_path", "one is 'video'"),
    ],
)
def test_media_under_unknown_keys(tmp_path: Path, record: Any, field: str, message: str) -> None:
    bad = fail(tmp_path, record)
    assert bad.field == field, bad
    assert message in bad.message, bad


@pytest.mark.parametrize("format", ["llava_video", "llava_instruct", "story"])
def test_media_under_unknown_keys_of_other_formats(tmp_path: Path, format: str) -> None:
    record: dict[str, Any] = {"video": "a.mp4", "text": "x"}
    if format != "story":
        record = llava(**{"video" if format == "llava_video" else "image": "a.mp4"})
    assert "names 'b.mp4'" in fail(tmp_path, {**record, "second": "b.mp4"}, format).message


def test_options_in_two_places_of_one_part(tmp_path: Path) -> None:
    part = {"type": "video", "video": {"url": "a.mp4", "fps": 1}, "fps": 2}
    assert fail(tmp_path, asked([part])).field == "messages[0].content[0].fps"
    picture = {"type": "image_url", "image_url": {"url": "p.png", "detail": "high"}}
    samples, bad = read(tmp_path, "messages", asked([picture]))
    assert not bad and samples[0].unread == ("content[].image_url.detail",)


def test_what_names_no_other_medium(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file that is read already, ids, pages, and texts that only speak of one."""
    record = asked(
        videos=["clips/a.mp4"],
        original="raw/a.mp4",
        video_id="yt123",
        url="https://youtube.com/watch?v=1",
        metadata={"src": "https://x.org/b.mp4", "thumbnail": "https://x.org/b.jpg"},
        note="See a.mp4.\nAnd b.mp4",
        empty=None,
    )
    samples, bad = read(tmp_path, "messages", record)
    assert not bad and samples[0].unread == ("original", "video_id", "url", "metadata", "note")
    caplog.set_level(logging.INFO)
    unread_keys.report_unread_keys(str(tmp_path), [samples[0].unread])
    assert "video_id (1)" in caplog.messages[0]  # no misspelt `video_end`


@pytest.mark.parametrize("format", ["messages", "llava_instruct"])
@pytest.mark.parametrize(
    ("text", "key", "file", "near"),
    [("<video>\n?", "video_path", "a.mp4", "video"), ("<image>\n?", "picture", "p.png", "image")],
)
def test_the_key_is_at_fault_where_a_placeholder_lacks_its_medium(
    tmp_path: Path, format: str, text: str, key: str, file: str, near: str
) -> None:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]
    samples, (bad,) = read(tmp_path, format, {"conversations": turns, key: file})
    assert not samples and bad.field == key
    assert f"names {file!r} under a key that is not read" in bad.message and repr(near) in bad.message
    samples, (bad,) = read(tmp_path, format, {"conversations": turns})
    assert not samples and "placeholder(s) in the text but 0" in bad.message


@pytest.mark.parametrize(("key", "kind"), [("videoID", "video"), ("youtube_id", "video"), ("image_id", "image")])
def test_an_id_alone_shows_nothing(tmp_path: Path, key: str, kind: str) -> None:
    """As in Video-MME's tables, read as messages or asked by predict; beside a medium an id is one more key."""
    for record in (asked("?"), {"question": "?", "answer": "x"}):
        bad = fail(tmp_path, {**record, key: "a"})
        assert (
            bad.field == key and f"'a' is an id, and nothing is shown; give the file's path as {kind!r}" in bad.message
        )
        (item,) = read_requests([tmp_path / "train.json"], "?", tmp_path)
        assert isinstance(item.question, Failure) and item.question.reason == "record" and key in item.question.message
        samples, none = read(tmp_path, "messages", {**record, key: "a", kind: "a.mp4"}, {**record, key: None}, record)
        assert not none and [sample.unread for sample in samples] == [(key,), (), ()]


def test_a_folder_of_frames_under_an_unknown_key(tmp_path: Path) -> None:
    """Of a record that shows nothing: it would be trained on text alone. The mend that is named works."""
    (tmp_path / "clips/a").mkdir(parents=True)
    (tmp_path / "clips/a/1.png").touch()
    bad = fail(tmp_path, asked("?", frames_dir="clips/a"))
    assert bad.field == "frames_dir" and "names the folder 'clips/a' under a key that is not read" in bad.message
    kept = [asked("?", video="clips/a"), asked("?", video="a.mp4", frames_dir="clips/a"), asked("?", folder="clips")]
    samples, none = read(tmp_path, "messages", *kept, asked("?", split="clips/a"))
    assert not none and [sample.unread for sample in samples] == [(), ("frames_dir",), ("folder",), ("split",)]


# --------------------------------------------------------------------------------------------------------- all others


def test_unread_keys_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    named = {"role": "user", "content": [{"type": "text", "text": "?", "cache_control": 1}], "name": "Eve"}
    records = [
        asked(videos=["a.mp4"], source="web", max_frame=8),
        asked(videos=["a.mp4"], source="web", fps=1),
        {"messages": [named, ANSWER], "fps": 1},
    ]
    samples, bad = read(tmp_path, "messages", *records)
    assert not bad
    told = [sample.unread for sample in samples]
    assert told == [("source", "max_frame"), ("source",), ("messages[].name", "content[].cache_control", "fps")]
    caplog.set_level(logging.INFO)
    unread_keys.report_unread_keys(str(tmp_path), told)
    unread_keys.report_unread_keys(str(tmp_path), told)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path}: keys that are not read, of 3 records: source (2), ")
    assert "max_frame [did you mean max_frames?] (1)" in line and "fps [no medium there takes it] (1)" in line
    unread_keys.report_unread_keys(str(tmp_path), [(), ()])
    assert caplog.messages == [line]


def test_lists_of_right_answers_are_read(tmp_path: Path) -> None:
    """By tasks; a text under the same key isn't."""
    made = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]}
    lists = {"answers": ["a", "b"], "references": ["c"], "answer": ["d"], "label": ["e"]}
    (tmp_path / "a.jsonl").write_text(json.dumps({**made, **lists}) + "\n" + json.dumps({**made, "label": "a"}) + "\n")
    samples, bad = read_messages(tmp_path / "a.jsonl", tmp_path)
    assert not bad and [sample.unread for sample in samples] == [(), ("label",)]


def test_unread_keys_of_other_formats(tmp_path: Path) -> None:
    ((one,), _) = read(tmp_path, "llava_video", llava(video="a.mp4", data_source="x", model="y"))
    assert one.unread == ("model",)
    segment = {"start_s": 1, "end_s": 2, "text": "y", "label": 3}
    ((one,), _) = read(tmp_path, "story", {"id": 1, "video": "a.mp4", "text": "x", "segments": [segment], "year": 1})
    assert one.unread == ("year", "segments[].label")


# -------------------------------------------------------------------------------------------------- system, questions


@pytest.mark.parametrize(
    ("format", "record"),
    [
        ("messages", asked(videos=["a.mp4"])),
        ("messages", llava(video="a.mp4")),
        ("messages", {"video": "a.mp4", "query": "What?", "response": "A cat."}),
        ("llava_video", llava(video="a.mp4")),
        ("llava_instruct", llava(image="a.jpg")),
        ("story", {"video": "a.mp4", "text": "A cat."}),
    ],
)
def test_a_record_s_system_is_used(tmp_path: Path, format: str, record: Any) -> None:
    (samples, bad) = read(tmp_path, format, {**record, "system": "Be brief."})
    assert not bad
    assert samples[0].turns[0].text == "Be brief."
    assert [turn.role for turn in samples[0].turns] == ["system", "user", "assistant"]


def test_two_system_texts(tmp_path: Path) -> None:
    said = {"role": "system", "content": "Be brief."}
    record = {"messages": [said, {"role": "user", "content": "?"}, ANSWER]}
    (samples, _) = read(tmp_path, "messages", {**record, "system": "Be brief."})
    assert [turn.role for turn in samples[0].turns] == ["system", "user", "assistant"]
    bad = fail(tmp_path, {**record, "system": "Be long."})
    assert bad.field == "system" and "'Be long.'" in bad.message and "'Be brief.'" in bad.message
