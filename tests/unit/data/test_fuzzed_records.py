"""Every reader on damaged files: samples inside the root, BadRecords with file and line, or one line naming the file.

Records and files that are right are damaged a little, so that what is read gets past the first check. About 10,000
examples, the same in every run.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.helpers.formats import (
    read_folders,
    read_kinetics,
    read_llava_instruct,
    read_llava_video,
    read_messages,
    read_ssv2,
    read_story,
    read_ucf101,
    read_video_mme,
)
from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.data.formats import video_mme
from vft.data.media.subtitles import Subtitles, parse_srt
from vft.data.records.record import BadRecord

Records = tuple[list[Sample], list[BadRecord]]
Read = Callable[[Path, Path], Records]


def examples(count: int) -> Any:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------------------------------------- what may happen


def is_line(text: str) -> bool:
    """Whether it can be printed as one line."""
    return len(text.splitlines()) == 1 and len(text.encode()) > 0


def check(read: Read, path: Path, root: Path, *others: str) -> None:
    """Read `path`; `others` are files beside it that an error may name instead."""
    try:
        samples, bad = read(path, root)
    except UserError as error:
        assert is_line(str(error))
        assert any(str(error).startswith(str(path.parent / name)) for name in (path.name, *others)), str(error)
        return
    lines = 1 + len(re.findall(rb"\r\n|\n|\r", path.read_bytes())) if path.is_file() else 0
    for record in bad:
        assert is_line(str(record)) and record.message
        if path.is_file() and path.suffix != ".parquet":
            name, _, line = record.origin.rpartition(":")
            assert name == path.name and 1 <= int(line) <= lines, record
    check_samples(samples, root)


def check_samples(samples: list[Sample], root: Path) -> None:
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        assert is_line(sample.origin) and sample.turns
        for turn in sample.turns:
            assert turn.parts
            for part in turn.parts:
                if isinstance(part, MediaRef):
                    paths = part.path if isinstance(part.path, tuple) else (part.path,)
                    assert paths and all(one.is_relative_to(root.resolve()) for one in paths)
                elif isinstance(part, str):
                    part.encode()
                else:
                    assert isinstance(part, Subtitles) and part.lines
        if "labels" in sample.fields:
            assert sample.fields["label"] in sample.fields["labels"] and sample.turns[-1].text


# ------------------------------------------------------------------------------------------------------------- damage

ODD = ("", " ", "\n", "a\nb", "\u2028", "\ud800", "\0", "a\0b", "é\u0301", "\u202e", "x" * 5000)
PATHS = ("..", ".", "~", "../../x", "/etc/passwd", "http://x/y", "file:x", "a.mp4")
WORDS = ("<video>", "<image>\n", "user", "gpt", "system", "video", "1", "-1")
TEXTS = st.sampled_from([*ODD, *PATHS, *WORDS]) | st.text(max_size=6)
NUMBERS = st.sampled_from([0, 1, -1, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None])
JUNK: st.SearchStrategy[Any] = st.one_of(
    TEXTS,
    NUMBERS,
    st.sampled_from([[], {}, [[]], [None], {"a": []}, [{}], {"": {"": ""}}, ["a.mp4"], ["0.jpg", 1], [["0.jpg"]]]),
)
EDIT = st.tuples(
    st.sampled_from(["drop", "put", "put", "wrap", "nest", "copy", "rename"]), st.integers(0, 60), JUNK, TEXTS
)
EDITS = st.lists(EDIT, min_size=1, max_size=3)


def spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a nested value, as container and key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from spots(item)


def damaged(records: list[Any], edits: list[tuple[str, int, Any, str]]) -> list[Any]:
    records = copy.deepcopy(records)
    for what, where, junk, name in edits:
        places = list(spots(records))
        if not places:
            break
        container, key = places[where % len(places)]
        if what == "drop":
            del container[key]
        elif what == "put":
            container[key] = copy.deepcopy(junk)
        elif what == "wrap":
            container[key] = [container[key]]
        elif what == "nest":
            container[key] = {name: container[key]}
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[name] = container[key] if what == "copy" else container.pop(key)
    return records


MARKS = b"\" ' \n \r \r\n , { } [ ] : \\ \\ud800 / ../ --> < NaN _ 0 \0 \xff \xc3 \xef\xbb\xbf \xe2\x80\xa8".split(b" ")
BYTES = st.sampled_from([b"", b" ", b"9" * 5000, b"[" * 3000, *MARKS])
CUTS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 12), BYTES), min_size=1, max_size=3)


def cut(content: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    """`content` with pieces replaced; lengths from 12 on stand for all the rest."""
    for start, length, put in cuts:
        start %= len(content) + 1
        content = content[:start] + put + (b"" if length == 12 else content[start + length :])
    return content


# --------------------------------------------------------------------------------------------------------------- JSON

SAID = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TYPED = [{"type": "video", "video": "a.mp4", "fps": 1.5, "video_start": 0}, {"type": "text", "text": "What?"}]
ANSWER = {"role": "assistant", "content": "A cat."}
JSON: dict[str, tuple[Read, list[Any]]] = {
    "messages": (
        read_messages,
        [
            {"id": "x", "messages": [{"role": "user", "content": TYPED}, ANSWER]},
            {"messages": [{"role": "user", "content": "<video>?"}, ANSWER], "videos": [["0.jpg", "1.jpg"]]},
        ],
    ),
    "llava_video": (
        read_llava_video,
        [
            {"id": "1", "conversations": SAID, "data_source": "s", "video": "a.mp4"},
            {"id": "2", "conversations": SAID, "data_source": "s", "video": "frames"},
        ],
    ),
    "llava_instruct": (read_llava_instruct, [{"id": "1", "image": "0.jpg", "conversations": SAID}]),
    "story": (
        read_story,
        [
            {
                "video": "a.mp4",
                "segments": [{"start_s": 0, "end_s": 2.5, "text": "Hi."}],
                "text": "All.",
                "speech": "Yo.",
            },
            {"id": "s", "images": ["0.jpg", "1.jpg"], "text": "A story."},
        ],
    ),
    "ssv2": (
        read_ssv2,
        [
            {"id": "7", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
            {"id": "8", "label": "cup falling", "template": "[Something] falling", "placeholders": ["cup"]},
        ],
    ),
}
SSV2_LABELS = {"Holding something": "0", "Something falling": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with media that the records name, and with what lies beside lists; the user's cache is left alone."""
    root = tmp_path_factory.mktemp("fuzzed")
    (root / "frames").mkdir()
    for name in ("a.mp4", "0.jpg", "1.jpg", "frames/1.jpg", "frames/2.jpg", "7.webm"):
        (root / name).write_bytes(b"x")
    (root / "labels.json").write_text(json.dumps(SSV2_LABELS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield root


@pytest.mark.parametrize("format", JSON)
@examples(700)
@given(edits=EDITS, in_lines=st.booleans())
@example(edits=[("copy", 36, None, "<image>\n")], in_lines=False)  # an unknown key of a typed part
def test_damaged_records(root: Path, format: str, edits: Any, in_lines: bool) -> None:
    read, records = JSON[format]
    records = damaged(records, edits)
    text = "\n".join(map(json.dumps, records)) if in_lines else json.dumps(records, indent=0)
    (root / "records.json").write_text(text)
    check(read, root / "records.json", root)


@pytest.mark.parametrize("format", JSON)
@examples(600)
@given(cuts=CUTS)
def test_damaged_json(root: Path, format: str, cuts: Any) -> None:
    read, records = JSON[format]
    (root / "records.json").write_bytes(cut(json.dumps(records, indent=0).encode(), cuts))
    check(read, root / "records.json", root)


@examples(150)
@given(edits=EDITS)
def test_damaged_labels_of_ssv2(root: Path, edits: Any) -> None:
    folder = root / "ssv2"
    folder.mkdir(exist_ok=True)
    (folder / "labels.json").write_text("\n".join(map(json.dumps, damaged([SSV2_LABELS], edits))))
    (folder / "train.json").write_text(json.dumps(JSON["ssv2"][1]))
    check(read_ssv2, folder / "train.json", root, "labels.json")


# --------------------------------------------------------------------------------------------------- lists and tables

UCF101 = b"YoYo/v_YoYo_g08_c01.avi 2\r\nTaiChi/v_TaiChi_g01_c01.avi\n\nYoYo/v_YoYo_g08_c02.avi 2\n"
UCF101_CLASSES = b"1 TaiChi\n2 YoYo\r\n3 JumpRope\n"
KINETICS = (
    b'label,youtube_id,time_start,time_end,split\nyoga,a-_1,1,11,val\n"a ""b"", c",x,100,110,val\nyoga,b,2,12,val\n'
)


@pytest.mark.parametrize("damage", ["list", "classes"])
@examples(350)
@given(cuts=CUTS)
def test_damaged_ucf101(root: Path, damage: str, cuts: Any) -> None:
    folder = root / "ucf101"
    folder.mkdir(exist_ok=True)
    path = folder / "trainlist01.txt"
    path.write_bytes(cut(UCF101, cuts) if damage == "list" else UCF101)
    (folder / "classInd.txt").write_bytes(UCF101_CLASSES if damage == "list" else cut(UCF101_CLASSES, cuts))
    check(read_ucf101, path, root, "classInd.txt")


@examples(600)
@given(cuts=CUTS)
def test_damaged_kinetics(root: Path, cuts: Any) -> None:
    folder = root / "kinetics"
    folder.mkdir(exist_ok=True)
    (folder / "val.csv").write_bytes(cut(KINETICS, cuts))
    check(read_kinetics, folder / "val.csv", root)


@examples(150)
@given(cuts=CUTS)
def test_damaged_classes(root: Path, cuts: Any) -> None:
    folder = root / "listed"
    (folder / "all" / "jump_rope").mkdir(parents=True, exist_ok=True)
    (folder / "all" / "jump_rope" / "a.mp4").write_bytes(b"x")
    (folder / "classes.txt").write_bytes(cut(b'yoga\njump rope\r\na "b", c', cuts))
    (folder / "val.csv").write_bytes(KINETICS)
    check(read_kinetics, folder / "val.csv", root, "classes.txt")
    check(read_folders, folder / "all", root, "classes.txt")


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=5)


@examples(250)
@given(names=st.lists(st.tuples(NAMES, NAMES, st.sampled_from([".mp4", ".JPG", ".txt", ""])), max_size=3))
def test_odd_folders(root: Path, names: list[tuple[str, str, str]]) -> None:
    shutil.rmtree(root / "folders", ignore_errors=True)
    for folder, name, suffix in names:
        if {folder, name + suffix}.isdisjoint({".", ".."}):
            path = root / "folders" / "train" / folder / (name + suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    check(read_folders, root / "folders" / "train", root, "")


# ---------------------------------------------------------------------------------------------------------- Video-MME

ROW = dict.fromkeys(video_mme.TEXTS, "x") | {"options": ["A. 1", "B. 2"], "answer": "A"}
SRT = (
    '\ufeff1\r\n00:00:00,500 --> 00:00:02,000\r\n<font size="1">Hello.</font>\r\n\r\n2\n00:01:02.0 --> 00:01:03.5\nYo\n'
)


def read_with_subtitles(path: Path, root: Path) -> Records:
    return read_video_mme(path, root, subtitles=True)


@examples(120)
@given(edits=EDITS)
def test_damaged_rows(root: Path, edits: Any) -> None:
    path = root / "mme.parquet"
    try:
        pq.write_table(pa.Table.from_pylist([row for row in damaged([ROW], edits) if isinstance(row, dict)]), path)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return  # what Parquet can't hold is no danger
    check(read_with_subtitles, path, root)


@examples(100)
@given(cuts=CUTS)
def test_damaged_parquet(root: Path, cuts: Any) -> None:
    path = root / "mme.parquet"
    pq.write_table(pa.Table.from_pylist([ROW, ROW]), path)
    path.write_bytes(cut(path.read_bytes(), cuts))
    check(read_with_subtitles, path, root)


@examples(100)
@given(cuts=CUTS)
def test_damaged_subtitles_of_a_video(root: Path, cuts: Any) -> None:
    path = root / "mme" / "t.parquet"
    if not path.exists():
        (path.parent / "subtitle").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([ROW | {"videoID": "s"}]), path)
    (path.parent / "subtitle" / "s.srt").write_bytes(cut(SRT.encode(), cuts))
    samples, bad = read_with_subtitles(path, root)
    assert len(samples) + len(bad) == 1
    assert all(one.field == "subtitles" and re.search(r"/s\.srt:[0-9]+: ", str(one)) for one in bad)
    check_samples(samples, root)


@examples(1130)
@given(cuts=CUTS)
def test_damaged_srt(cuts: Any) -> None:
    try:
        lines = parse_srt(cut(SRT.encode(), cuts).decode(errors="replace"), "a.srt")
    except UserError as error:
        assert re.match(r"a\.srt:[0-9]+: ", str(error)) and is_line(str(error))
        return
    assert all(text == " ".join(text.split()) and text and start >= 0 and end >= 0 for start, end, text in lines)
