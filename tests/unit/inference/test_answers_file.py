"""A file of answers: what is in it stays, what is cut off goes, and nothing is asked twice."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from vft.common.errors import UserError
from vft.common.task import Answer
from vft.inference.answers_file import AnswersFile, table_text
from vft.inference.engine import Failure
from vft.inference.requests import Request, read_requests

SETTINGS = {"model": "base", "adapter": None, "weights": "abc", "video": {"fps": 2.0, "max_frames": 32}}
ODD = "two lines\u2028\x85\r\nof 狗 and 🐕"
"""Breaks that are none in JSONL, and characters of several bytes."""


def items_of(folder: Path, *records: Any) -> list[Request]:
    (folder / "ask.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return read_requests([folder / "ask.jsonl"], "What?", None)


def said(item: Request, text: str) -> Answer:
    assert not isinstance(item.question, Failure)
    return Answer(item.question, text)


def written(path: Path, answers: list[tuple[Request, str | Failure]]) -> bytes:
    file = AnswersFile(path, SETTINGS)
    file.begin()
    for item, answer in answers:
        file.add(item, said(item, answer) if isinstance(answer, str) else answer)
        assert path.read_bytes().endswith(b"}\n")  # at once, not when the process ends
    return path.read_bytes()


def test_cut_off_anywhere(tmp_path: Path) -> None:
    """Whole answers before the cut are known, the rest is as if it had not been written."""
    items = items_of(tmp_path, *({"id": str(i), "video": "a.mp4"} for i in range(3)))
    path = tmp_path / "out.jsonl"
    whole = written(path, [(item, ODD) for item in items])
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 3
    ends, character = (len(lines[0]), len(lines[0]) + len(lines[1])), whole.rindex("狗".encode())
    cuts = {*range(ends[0] - 3, ends[0] + 10), *range(ends[1] - 3, ends[1] + 3), *range(character, character + 12)}
    for cut in sorted({*cuts, len(whole) - 1}):
        path.write_bytes(whole[:cut])
        file = AnswersFile(path, SETTINGS)
        count = sum(cut >= len(b"".join(lines[: i + 1])) - 1 for i in range(3))  # a last break may be missing
        assert [file.has(item) for item in items] == [i < count for i in range(3)], cut
        file.begin()
        assert path.read_bytes() == b"".join(lines[:count])


def test_another_part_of_a_video_is_another_question(tmp_path: Path) -> None:
    path, clip = tmp_path / "out.jsonl", {"id": "a", "video": "a.mp4"}
    whole, first, second = ({**clip, **keys} for keys in ({}, {"video_end": 2}, {"video_start": 2, "video_end": 3.5}))
    written(path, [(item, "Yes.") for record in (first, second) for item in items_of(tmp_path, record)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line.get("start_s"), line.get("end_s")) for line in lines] == [(None, 2), (2, 3.5)]
    file = AnswersFile(path, SETTINGS)
    assert [file.has(*items_of(tmp_path, record)) for record in (whole, first, second)] == [False, True, True]


def test_folders_are_made(tmp_path: Path) -> None:
    (item,) = items_of(tmp_path, {"video": "a.mp4"})
    path = tmp_path / "new" / "folder" / "out.jsonl"
    assert written(path, [(item, "Yes.")]).count(b"\n") == 1 and AnswersFile(path, SETTINGS).has(item)


def test_two_commands_do_not_write_to_one_file(tmp_path: Path) -> None:
    """Nor does the later one take away what the earlier one has written since it looked."""
    item, other = items_of(tmp_path, {"video": "a.mp4"}, {"video": "b.mp4"})
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": "cut o')
    first, second = AnswersFile(path, SETTINGS), AnswersFile(path, SETTINGS)
    first.begin()
    with pytest.raises(UserError, match="another command writes to it"):
        second.begin()
    first.add(item, said(item, "Yes."))
    before = path.read_bytes()
    del first
    with pytest.raises(UserError, match="another command has written to it since"):
        second.begin()
    assert path.read_bytes() == before and before.count(b"\n") == 1
    third = AnswersFile(path, SETTINGS)
    assert third.has(item) and not third.has(other)
    third.begin()
    third.add(other, said(other, "No."))
    assert path.read_bytes().startswith(before) and path.read_bytes().count(b"\n") == 2


def test_an_error_is_asked_again_and_its_line_goes(tmp_path: Path) -> None:
    items = items_of(tmp_path, {"video": "a.mp4"}, {"video": "b.mp4"})
    path = tmp_path / "out.jsonl"
    written(path, [(items[0], Failure("a.mp4", "missing", "a.mp4: no such file")), (items[1], "Yes.")])
    file = AnswersFile(path, SETTINGS)
    assert [file.has(item) for item in items] == [False, True]
    file.begin()
    (line,) = (json.loads(one) for one in path.read_text().splitlines())
    assert line == {
        "id": "ask-2",
        "video": str(tmp_path / "b.mp4"),
        "prompt": "What?",
        "prediction": "Yes.",
        "settings": SETTINGS,
    }


@pytest.mark.parametrize(
    "other",
    [
        {"id": "x", "video": "b.mp4", "prompt": "Who?"},
        {"id": "x", "video": "a.mp4", "prompt": "Where?"},
        {"id": "x", "videos": ["a.mp4", "a.mp4"], "prompt": "Who?"},
        {
            "id": "x",
            "video": "a.mp4",
            "messages": [
                {"role": "user", "content": "<video>Well?"},
                {"role": "assistant", "content": "Well."},
                {"role": "user", "content": "Who?"},
            ],
        },
    ],
)
def test_what_makes_another_question(tmp_path: Path, other: dict[str, Any]) -> None:
    """Of one id: another medium, another text, other turns before it."""
    path = tmp_path / "out.jsonl"
    (item,) = items_of(tmp_path, {"id": "x", "video": "a.mp4", "prompt": "Who?"})
    written(path, [(item, "I.")])
    assert AnswersFile(path, SETTINGS).has(item)
    assert not AnswersFile(path, SETTINGS).has(items_of(tmp_path, other)[0])


def test_names_may_change_and_settings_may_not(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    (item,) = items_of(tmp_path, {"id": "x", "video": "a.mp4", "prompt": "Who?"})
    written(path, [(item, "I.")])
    assert AnswersFile(path, {**SETTINGS, "model": "moved", "adapter": "there"}).has(item)
    for changed, named in (
        ({"weights": "abd"}, "weights = 'abc' (base), now weights = 'abd' (base)"),
        ({"video": {"fps": 2.0, "max_frames": 64}}, "video.max_frames = 32 (base), now video.max_frames = 64"),
        ({"video": {"frames": 8}}, "video.frames = None (base), now video.frames = 8"),
        ({"quantize": "nf4"}, "quantize = None (base), now quantize = 'nf4'"),
    ):
        with pytest.raises(UserError) as refused:
            AnswersFile(path, {**SETTINGS, **changed})
        assert str(refused.value).startswith(f"{path}:1: was answered with {named}"), refused.value


def test_a_table_holds_what_lines_do(tmp_path: Path) -> None:
    """Whatever stands in names and answers; without columns that nothing fills."""
    odd = 'down; "quick", über\nthe edge'
    bad = Failure("b.mp4", "not_a_video", "b.mp4: holds no video")
    path = tmp_path / "table.csv"
    lines = [
        {
            "id": "a, b.mp4",
            "video": "a, b.mp4",
            "prompt": None,
            "prediction": odd,
            "probabilities": {odd: 0.75, "up": 0.25},
        },
        {"id": "b", "video": ["b.mp4", "c.mp4"], "prompt": None, "error": {"message": bad.message}},
    ]
    path.write_text(table_text(lines), encoding="utf-8")
    head, first, second = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
    assert head == ["id", "video", "prediction", "probability", "error", odd, "up"]
    assert first == ["", "a, b.mp4", odd, "0.75", "", "0.75", "0.25"]
    assert second == ["b", "b.mp4; c.mp4", "", "", bad.message, "", ""]
