"""Video-MME as Parquet, and subtitles: the official prompt word for word, and only the lines that overlap a frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.formats import read_error, read_video_mme, sample_of, write
from vft.common.errors import UserError
from vft.common.types import Conversation, MediaInfo, MediaPlan, MediaRef, Turn
from vft.data.media.timed_text import Subtitles, parse_srt

ROW = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many {red} socks\nare above the fireplace?",
    "options": ["A. 1.", "B. 4.", "C. 2.", "D. 3."],
    "answer": "C",
}
QUESTION = """Respond with only the letter (A, B, C, or D) of the correct option.
How many {red} socks
are above the fireplace?
A. 1.
B. 4.
C. 2.
D. 3.
The best answer is:"""
PLAIN = f"Select the best answer to the following multiple-choice question based on the video. {QUESTION}"
SUBTITLED = (
    f"Select the best answer to the following multiple-choice question based on the video and the subtitles. {QUESTION}"
)
SRT = """\ufeff1\r
00:00:00,500 --> 00:00:02,000\r
<font color="white" size=".72c">Hello <i>there</i>.</font>\r
\r
2\r
00:00:02,000 --> 00:00:04,000\r
General\r
Kenobi!\r
"""


def parquet(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def fail(path: Any, root: Path, *words: str) -> None:
    assert read_error(lambda: read_video_mme(path, root), *words).startswith(str(path))


def test_a_row(tmp_path: Path) -> None:
    rows = [{**ROW, "start": 3}, ROW | {"question_id": "001-2", "start": 3}]
    path = parquet(tmp_path / "videomme/test-00000-of-00001.parquet", *rows)
    file = write(tmp_path / "data/fFjv93ACGo8.mp4")
    write(tmp_path / "subtitle/fFjv93ACGo8.srt", SRT)
    (sample, other), bad = read_video_mme(path, tmp_path)
    assert not bad
    assert (sample.id, sample.origin) == ("001-1", "test-00000-of-00001.parquet:1")
    assert sample.unread == ("start",)
    assert (other.id, other.origin) == ("001-2", "test-00000-of-00001.parquet:2")
    ref = MediaRef("video", file.resolve(), field="videoID")
    assert sample.turns == (Turn("user", (ref, PLAIN)), Turn("assistant", ("C",)))
    groups = {key: ROW[key] for key in ("duration", "domain", "sub_category", "task_type")}
    assert sample.fields == {"options": ("A", "B", "C", "D"), "groups": groups, "question_id": "001-1"}


@pytest.mark.parametrize(
    ("place", "media"),
    [
        ("data/fFjv93ACGo8.mp4", ""),
        ("data/fFjv93ACGo8.MP4", ""),
        ("data/fFjv93ACGo8.mkv", ""),
        ("sets/Video-MME/data/fFjv93ACGo8.mp4", ""),
        ("clips/data/fFjv93ACGo8.mkv", "clips"),
        ("data/fFjv93ACGo8.MP4", "clips"),
    ],
)
def test_where_a_video_lies(tmp_path: Path, place: str, media: str) -> None:
    parquet(tmp_path / "sets/Video-MME/videomme/test.parquet", ROW)
    file = write(tmp_path / place)
    write((tmp_path / place).parent.parent / "subtitle/fFjv93ACGo8.srt", SRT)
    for path in ("sets/Video-MME", "sets/Video-MME/videomme/test.parquet"):
        sample = sample_of(read_video_mme(tmp_path / path, tmp_path, media=media, subtitles=True))
        assert sample.turns[0].parts[0].path == file.resolve()
        assert isinstance(sample.turns[0].parts[1], Subtitles)


def test_a_folder_of_files_and_odd_paths(tmp_path: Path) -> None:
    folder = tmp_path / "a [1]*?/__x/y"
    for i in (2, 1):
        parquet(folder / f"part-{i}.parquet", ROW | {"question_id": str(i)})
    write(folder / "readme.md")
    for path in (tmp_path / "a [1]*?", str(folder)):
        samples, bad = read_video_mme(path, tmp_path)
        assert not bad
        assert [(s.id, s.origin) for s in samples] == [("1", "part-1.parquet:1"), ("2", "part-2.parquet:1")]


def test_a_missing_video_is_not_the_readers_problem(tmp_path: Path) -> None:
    path = parquet(tmp_path / "test.parquet", ROW)
    sample = sample_of(read_video_mme(path, tmp_path, media="clips"))
    assert sample.turns[0].parts[0].path == tmp_path.resolve() / "clips/data/fFjv93ACGo8.mp4"


def test_other_numbers_of_options(tmp_path: Path) -> None:
    row = ROW | {"options": ["A. Yes", "B. No", "C. 3.14"], "answer": "B"}
    sample = sample_of(read_video_mme(parquet(tmp_path / "t.parquet", row), tmp_path))
    assert sample.fields["options"] == ("A", "B", "C")
    assert "the letter (A, B, or C) of" in sample.turns[0].text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"options": ["A. 1."]}, "options"),
        ({"options": ["1.", "2."]}, "options"),
        ({"options": ["A. 1.", "C. 2."]}, "options"),
        ({"options": ["A. 1.", "B. "]}, "options"),
        ({"options": ["A. 1.", None]}, "options[1]"),
        ({"options": None}, "options"),
        ({"answer": "E"}, "answer"),
        ({"answer": "C. 2."}, "answer"),
        ({"answer": None}, "answer"),
        ({"question": " "}, "question"),
        ({"question_id": None}, "question_id"),
        ({"videoID": ""}, "videoID"),
        ({"videoID": "../../../x"}, "videoID"),
        ({"domain": None}, "domain"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    samples, bad = read_video_mme(parquet(tmp_path / "t.parquet", ROW, ROW | change), tmp_path)
    assert len(samples) == 1
    assert [(one.origin, one.field) for one in bad] == [("t.parquet:2", field)] and "\n" not in str(bad[0])


def test_other_types(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", ROW | {"question_id": 1}, ROW | {"question_id": 2})
    samples, bad = read_video_mme(path, tmp_path)
    assert not samples and [one.field for one in bad] == ["question_id"] * 2 and "of type int" in bad[0].message
    path = parquet(tmp_path / "t.parquet", ROW | {"options": "A. 1.\nB. 2."})
    assert read_video_mme(path, tmp_path)[1][0].field == "options"


def test_files_that_are_no_video_mme(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", {key: ROW[key] for key in ("videoID", "question", "answer", "options")})
    fail(path, tmp_path, "no column question_id, duration", "found", "'videoID', 'question'")
    for name, content in (("bad", b"PAR1 nonsense PAR1"), ("empty", b""), ("text", b"a,b\n1,2\n")):
        (tmp_path / f"{name}.parquet").write_bytes(content)
        fail(tmp_path / f"{name}.parquet", tmp_path, "can't be read (ArrowInvalid: ")
    (tmp_path / "nothing").mkdir()
    fail(tmp_path / "nothing", tmp_path, "no .parquet files")
    fail(tmp_path / "gone.parquet", tmp_path, "no .parquet files")


def test_the_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for url in ("hf://datasets/lmms-lab/Video-MME/videomme", "hf://datasets/lmms-lab/Video-MME/test.parquet"):
        fail(url, tmp_path, "can't be listed", "offline", "network")


# -------------------------------------------------------------------------------------------------------- subtitles


def plan(*times_s: float) -> MediaPlan:
    info = MediaInfo("video", 28, 28, len(times_s), 1.0, times_s=times_s)
    ref = MediaRef("video", Path("a.mp4"))
    return MediaPlan(ref, info, tuple(range(len(times_s))), 28, 28, (1, 2, 2), 1)


def test_with_subtitles(tmp_path: Path) -> None:
    rows = (ROW, ROW | {"question_id": "001-2"}, ROW | {"question_id": "002-1", "videoID": "other"})
    path = parquet(tmp_path / "t.parquet", *rows)
    write(tmp_path / "subtitle/fFjv93ACGo8.srt", SRT)
    (sample, same, without), bad = read_video_mme(path, tmp_path, subtitles=True)
    assert not bad
    lines = ((0.5, 2.0, "Hello there."), (2.0, 4.0, "General Kenobi!"))
    assert sample.turns[0].parts[1:] == (Subtitles(lines), SUBTITLED)
    assert same.turns[0].parts[1].lines is sample.turns[0].parts[1].lines  # read once
    assert without.turns[0].parts[1:] == (PLAIN,)
    conversation = Conversation(sample.id, sample.turns, sample.origin)
    seen = "This video's subtitles are listed below:\nHello there.\nGeneral Kenobi!\n"
    assert conversation.resolved([plan(0.0, 1.0, 1.5, 3.0)]).turns[0].text == seen + SUBTITLED
    assert conversation.resolved([plan(0.0, 5.0)]).turns[0].text == SUBTITLED


def test_a_bad_subtitle_file(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", ROW)
    file = write(tmp_path / "subtitle/fFjv93ACGo8.srt", SRT + "\n3\n00:00:05 --> 7\nHi\n")
    samples, (bad,) = read_video_mme(path, tmp_path, subtitles=True)
    assert not samples and (bad.origin, bad.field) == ("t.parquet:1", "subtitles")
    assert bad.message.startswith(f"{file.resolve()}:11: '00:00:05 --> 7' must be times")
    assert sample_of(read_video_mme(path, tmp_path)).id == "001-1"
    file.write_bytes(b"1\n\xff\xfe")
    assert f"{file.resolve()}:2: byte 2 is not UTF-8" in read_video_mme(path, tmp_path, subtitles=True)[1][0].message


def test_lines_that_overlap_a_frame() -> None:
    lines = ((0.0, 1.0, "a"), (1.0, 3.0, "b"), (2.0, 2.5, "c"), (4.0, 4.0, "never"), (3.0, 9.0, "b"), (9.0, 8.0, "no"))
    subtitles = Subtitles(lines, media=1)

    def resolve(*times_s: float) -> list[str]:
        text = subtitles.resolve([plan(0.0, 2.2, 3.5), plan(*times_s)])
        assert not text or (text.startswith("This video's subtitles are listed below:\n") and text.endswith("\n"))
        return text.splitlines()[1:]

    assert resolve(0.0) == ["a"]
    assert resolve(1.0) == ["b"]  # a line has gone at the moment where it ends
    assert resolve(2.0, 2.1, 2.2) == ["b", "c"]
    assert resolve(0.999, 2.5, 4.0, 8.9) == ["a", "b", "b"]  # the same words said twice
    assert resolve(9.0, 100.0) == [] == resolve()


AT_1, AT_3 = "00:00:01,0 --> 00:00:02,0\n", "00:00:03,0 --> 00:00:04,0\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("\r\n\n", []),
        (SRT, [(0.5, 2.0, "Hello there."), (2.0, 4.0, "General Kenobi!")]),
        (SRT.replace("\r", ""), [(0.5, 2.0, "Hello there."), (2.0, 4.0, "General Kenobi!")]),
        (SRT.replace("\n", ""), [(0.5, 2.0, "Hello there."), (2.0, 4.0, "General Kenobi!")]),
        ("00:00:01,5 --> 01:00:02,25\na\n01:02.125-->0:0:3.0 X1:0\n b \n", [(1.5, 3602.25, "a"), (62.125, 3.0, "b")]),
        (f"\n\n7\n\n{AT_1}\na\n\n\nb\n\n8\n\n{AT_3}c", [(1, 2, "a b"), (3, 4, "c")]),
        (f"1\n{AT_1}2\n{AT_3}c", [(3, 4, "c")]),
        (f"{AT_1}1984\n\n{AT_3}year\n42\n", [(1, 2, "1984"), (3, 4, "year 42")]),
        (f"1\n{AT_1}12\n\n2\n{AT_3}{{\\an8}}x < 3 <3 <b\n>", [(1, 2, "12"), (3, 4, "x < 3 <3")]),
        (f"1\n{AT_1}<i></i>\n\n", []),
        ("WEBVTT\n\n00:01.000 --> 00:02.000 align:start\n<c.x>a</c>\n", [(1, 2, "a")]),
    ],
)
def test_srt(text: str, expected: list[tuple[float, float, str]]) -> None:
    assert list(parse_srt(text.removeprefix("\ufeff"), "a.srt")) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1\n00:00:01,0 --> 00:00:02\na", 2),
        ("1\n00:00:01,0 - 00:00:02,0\na", 2),
        ("00:00:01,0 --> 00:00:02,0\na\n\n2\n00:0x:03,0 --> 00:00:04,0\nb", 5),
        ("00:00:01,0 --> 00:00:02,0\na\n\n-->", 4),
        ("00:00:01,0 -->\n00:00:02,0\na", 1),
        ("<html>\nNot found", 1),
    ],
)
def test_malformed_srt(text: str, line: int) -> None:
    with pytest.raises(UserError) as caught:
        parse_srt(text, "a.srt")
    assert str(caught.value).startswith(f"a.srt:{line}: ") and "\n" not in str(caught.value)
