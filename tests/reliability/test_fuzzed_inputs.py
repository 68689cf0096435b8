"""Damaged records, tables, archives and settings of every kind: never a traceback, and lines that say where.

What is right is damaged a little, so that it gets past the first check. Some 10,000 inputs, the same in every run;
`--count N` tries N of each kind.
"""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.formats import read_source, write
from vft.common.errors import UserError
from vft.common.types import MediaRef, Sample
from vft.config import run as configs
from vft.data.formats import pe_video, video_mme
from vft.data.media.timed_text import Subtitles, parse_srt
from vft.data.streaming.archives import DamagedArchive

# ------------------------------------------------------------------------------------------------- what may happen


def is_line(text: str) -> bool:
    """Whether it can be printed as one line."""
    return len(text.splitlines()) == 1 and len(text.encode()) > 0


def check(format: str, path: Path, root: Path, *others: str, records: int = 0, **settings: Any) -> None:
    """Read `path`, of so many records at least; `others` are files beside it that an error may name instead."""
    try:
        samples, bad = read_source(format, path, root, **settings)
    except UserError as error:
        assert is_line(str(error))
        assert any(str(error).startswith(str(path.parent / name)) for name in (path.name, *others)), str(error)
        return
    assert len(samples) + len(bad) >= records
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
            assert sample.turns[-1].text in sample.fields["labels"]


# ------------------------------------------------------------------------------------------------------------- damage

ODD = ("", " ", "\n", "a\nb", "\u2028", "\ud800", "\0", "a\0b", "é\u0301", "\u202e", "x" * 5000)
PATHS = ("..", ".", "~", "../../x", "/etc/passwd", "http://x/y", "file:x", "a.mp4", "/data/local-files/?d=%00", "D:\\a")
WORDS = ("<video>", "<image>\n", "user", "gpt", "system", "video", "1", "-1", "[1", "{[]: 1}", "['a']", "answer")
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


# ---------------------------------------------------------------------------------------------------------- records

SAID = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
TYPED = [{"type": "video", "video": "a.mp4", "fps": 1.5, "video_start": 0}, {"type": "text", "text": "What?"}]
ANSWER = {"role": "assistant", "content": "A cat."}
ANNOTATED = [
    {"from_name": "part", "type": "timelinelabels", "value": {"start": 0, "end": 1.5, "timelinelabels": ["Run"]}},
    {"from_name": "kind", "type": "choices", "value": {"choices": ["run"]}},
]
JSON: dict[str, list[Any]] = {
    "messages": [
        {"id": "x", "messages": [{"role": "user", "content": TYPED}, ANSWER]},
        {"messages": [{"role": "user", "content": "<video>?"}, ANSWER], "videos": [["0.jpg", "1.jpg"]]},
    ],
    "messages in other layouts": [
        {"instruction": "Say", "input": "it.", "output": ["x", "y"], "history": [["a", "b"]], "video_path": "a.mp4"},
        {"id": 1, "data": {"video": "/data/upload/1/a.mp4"}, "annotations": [{"result": ANNOTATED}]},
        {"annotator": 1, "annotation_id": 2, "file_name": "/data/local-files/?d=a.mp4", "said": {"choices": ["run"]}},
        {"video": "a.mp4", "question": "[1]?", "options": "['a', 'b']", "answers": {"text": ["a"]}, "trim": "[1, 2]"},
    ],
    "llava_video": [
        {"id": "1", "conversations": SAID, "data_source": "s", "video": "a.mp4"},
        {"id": "2", "conversations": SAID, "data_source": "s", "video": "frames"},
    ],
    "llava_instruct": [{"id": "1", "image": "0.jpg", "conversations": SAID}],
    "story": [
        {
            "video": "a.mp4",
            "segments": [{"start_s": 0, "end_s": 2.5, "text": "Hi."}],
            "text": "All.",
            "speech": "Yo.",
        },
        {"id": "s", "images": ["0.jpg", "1.jpg"], "text": "A story."},
    ],
    "ssv2": [
        {"id": "7", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
        {"id": "8", "label": "cup falling", "template": "[Something] falling", "placeholders": ["cup"]},
    ],
}
SSV2_LABELS = {"Holding something": "0", "Something falling": "1"}


UCF101 = b"YoYo/v_YoYo_g08_c01.avi 2\r\nTaiChi/v_TaiChi_g01_c01.avi\n\nYoYo/v_YoYo_g08_c02.avi 2\n"
UCF101_CLASSES = b"1 TaiChi\n2 YoYo\r\n3 JumpRope\n"
UCF101_FILES = {"list.txt": UCF101, "classInd.txt": UCF101_CLASSES}
CLASSES = b'yoga\njump rope\r\na "b", c'
KINETICS = (
    b'label,youtube_id,time_start,time_end,split\nyoga,a-_1,1,11,val\n"a ""b"", c",x,100,110,val\nyoga,b,2,12,val\n'
)
NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=5)
FILES = st.lists(st.tuples(NAMES, NAMES, st.sampled_from([".mp4", ".JPG", ".txt", ""])), max_size=3)
ROW = dict.fromkeys(video_mme.TEXTS, "x") | {"options": ["A. 1", "B. 2"], "answer": "A"}
SRT = (
    '\ufeff1\r\n00:00:00,500 --> 00:00:02,000\r\n<font size="1">Hello.</font>\r\n\r\n2\n00:01:02.0 --> 00:01:03.5\nYo\n'
)


def damaged_records(format: str, root: Path, drawn: Any) -> None:
    edits, in_lines = drawn
    records = damaged(JSON[format], edits)
    text = "\n".join(map(json.dumps, records)) if in_lines else json.dumps(records, indent=0)
    (root / "records.json").write_text(text)
    is_list = in_lines and isinstance(
        next(iter(records), None), list
    )  # a first line that is a list is a JSON list of records
    check(format.partition(" ")[0], root / "records.json", root, records=0 if is_list else len(records))


def damaged_json(format: str, root: Path, cuts: Any) -> None:
    (root / "records.json").write_bytes(cut(json.dumps(JSON[format], indent=0).encode(), cuts))
    check(format.partition(" ")[0], root / "records.json", root)


def damaged_file(format: str, path: str, files: dict[str, bytes], damaged_name: str, root: Path, cuts: Any) -> None:
    """Cuts in one of the files that a list is made of."""
    for name, content in files.items():
        (root / name).write_bytes(cut(content, cuts) if name == damaged_name else content)
    check(format, root / path, root, *files)


def damaged_labels_of_ssv2(root: Path, edits: Any) -> None:
    (root / "labels.json").write_text("\n".join(map(json.dumps, damaged([SSV2_LABELS], edits))))
    (root / "train.json").write_text(json.dumps(JSON["ssv2"]))
    check("ssv2", root / "train.json", root, "labels.json")


def damaged_classes(root: Path, cuts: Any) -> None:
    damaged_file("kinetics", "val.csv", {"classes.txt": CLASSES, "val.csv": KINETICS}, "classes.txt", root, cuts)
    write(root / "all" / "jump_rope" / "a.mp4")
    check("folders", root / "all", root, "classes.txt")


def odd_folders(root: Path, names: Any) -> None:
    shutil.rmtree(root / "folders", ignore_errors=True)
    for folder, name, suffix in names:
        if {folder, name + suffix}.isdisjoint({".", ".."}):
            write(root / "folders" / "train" / folder / (name + suffix))
    check("folders", root / "folders" / "train", root, "")


def damaged_parquet(root: Path, drawn: Any) -> None:
    edits, cuts = drawn
    path = root / "mme.parquet"
    try:
        rows = [row for row in damaged([ROW, ROW], edits) if isinstance(row, dict)]
        pq.write_table(pa.Table.from_pylist(rows), path)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return  # what Parquet cannot hold is no danger
    path.write_bytes(cut(path.read_bytes(), cuts))
    check("video_mme", path, root, subtitles=True)


def damaged_subtitles(root: Path, cuts: Any) -> None:
    path = root / "mme" / "t.parquet"
    if not path.exists():
        (path.parent / "subtitle").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([ROW | {"videoID": "s"}]), path)
    (path.parent / "subtitle" / "s.srt").write_bytes(cut(SRT.encode(), cuts))
    samples, bad = read_source("video_mme", path, root, subtitles=True)
    assert len(samples) + len(bad) == 1
    assert all(one.field == "subtitles" and re.search(r"/s\.srt:[0-9]+: ", str(one)) for one in bad)
    check_samples(samples, root)


def damaged_srt(root: Path, cuts: Any) -> None:
    try:
        lines = parse_srt(cut(SRT.encode(), cuts).decode(errors="replace"), "a.srt")
    except UserError as error:
        assert re.match(r"a\.srt:[0-9]+: ", str(error)) and is_line(str(error))
        return
    assert all(text == " ".join(text.split()) and text and start >= 0 and end >= 0 for start, end, text in lines)


def damaged_tar(root: Path, drawn: Any) -> None:
    edits, cuts = drawn
    content = io.BytesIO()
    record: dict[str, Any] = {"human_caption": "A cat.", "model_caption": "", "description": {"a": ["b", 1]}}
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(3):
            about = damaged([record], edits) if number == 1 else [record]
            for suffix, text in ((".mp4", b"x"), (".json", json.dumps(about[0] if about else None).encode())):
                entry = tarfile.TarInfo(f"{number}{suffix}")
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))
    (root / "a.tar").write_bytes(cut(content.getvalue(), cuts) if cuts else content.getvalue())
    (root / "spool").mkdir(exist_ok=True)
    try:
        for clip in pe_video.read_clips(str(root / "a.tar"), 0, root / "spool"):
            assert all(is_line(str(one)) and one.origin.startswith("a.tar/") for one in clip.bad)
            check_samples(clip.samples, root)
            clip.remove()
    except DamagedArchive as error:
        assert is_line(str(error)) and str(error).startswith(str(root / "a.tar"))


# --------------------------------------------------------------------------------------------------------- settings

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))
ALL_SETTINGS = {
    "output_dir": "runs/x",
    "seed": 1,
    "model": {"path": "m", "quantize": "none"},
    "lora": {"rank": 8, "alpha": 16, "ranks": {"language_model.q_proj": 3}, "targets": ["language_model.*"]},
    "data": {
        "root": "d",
        "sources": [{"format": "messages", "path": "a.jsonl"}, {"format": "llava_video", "path": "b", "weight": 2}],
        "video": {"fps": 1.5, "max_frames": 8},
        "workers": 2,
        "cache": "none",
    },
    "train": {
        "max_steps": 20,
        "warmup_steps": 2,
        "precision": "fp32",
        "component_learning_rates": {"language_model": 1e-4},
    },
    "parallel": {"shard": 1, "memory_budget_gib": 3.5, "activation_checkpointing": "auto"},
    "checkpoint": {"every_steps": 5, "keep_last": 2},
    "eval": {"every_steps": 0, "sources": [{"format": "story", "path": "e.jsonl"}]},
    "log": {"every_steps": 1, "profile_steps": [1, 2]},
}
ODD_TOML = b"\" ' \n = [ ] { } . # \\ \\ud800 nan inf 0x 1e999 1979-05-27 '''\n \0 \xff \xc3 \xe2\x80\xa8".split(b" ")
TOML_BYTES = [*ODD_TOML, b"9" * 5000, b"0x" + b"f" * 6000, b"[" * 3000, b"a=" + b"[" * 3000 + b"]" * 3000, b"x." * 3000]
TOML_CUTS = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 12), st.sampled_from(TOML_BYTES)), min_size=1, max_size=3
)
OVERRIDES = st.tuples(
    st.sampled_from(
        ["data.workers", "data.sources.0.path", "lora", "data.sources.9.path", "a.b", "", ".", "model.path"]
    )
    | st.text(max_size=8),
    st.sampled_from(["", "=", "==", "=[", "={a=1}", "=" + "[" * 3000, "=0x" + "f" * 6000, "=1\nseed=2", "='"])
    | st.text(max_size=8),
).map("".join)


def load_settings(file: Path, *overrides: str) -> None:
    """A configuration, or one line that names the file or the command line, and what stands there."""
    try:
        configs.load(file, overrides)
    except UserError as error:
        line = str(error)
        assert is_line(line) and len(line) < 1500, line
        assert line.startswith((f"{file}: ", f"{file} and command line: ", "command line: ")), line
        assert line.partition(": ")[2]


def damaged_toml(root: Path, drawn: Any) -> None:
    recipe, cuts = drawn
    (root / "a.toml").write_bytes(cut(RECIPES[recipe % len(RECIPES)].read_bytes(), cuts))
    load_settings(root / "a.toml")


def damaged_settings(root: Path, edits: Any) -> None:
    table = (damaged([ALL_SETTINGS], edits) or [{}])[0]
    try:
        text = tomli_w.dumps(table)
        tomllib.loads(text)
        text.encode()
    except (TypeError, ValueError, AttributeError):
        return  # not TOML
    (root / "a.toml").write_text(text)
    load_settings(root / "a.toml")


def odd_overrides(root: Path, override: str) -> None:
    (root / "a.toml").write_text(tomli_w.dumps(ALL_SETTINGS))
    load_settings(root / "a.toml", override)


KINDS: dict[str, tuple[int, st.SearchStrategy[Any], Callable[[Path, Any], None]]] = {
    **{f"records of {name}": (700, st.tuples(EDITS, st.booleans()), partial(damaged_records, name)) for name in JSON},
    **{f"JSON of {name}": (600, CUTS, partial(damaged_json, name)) for name in JSON},
    "labels of ssv2": (150, EDITS, damaged_labels_of_ssv2),
    **{
        f"{name} of ucf101": (350, CUTS, partial(damaged_file, "ucf101", "list.txt", UCF101_FILES, name))
        for name in UCF101_FILES
    },
    "kinetics": (600, CUTS, partial(damaged_file, "kinetics", "val.csv", {"val.csv": KINETICS}, "val.csv")),
    "classes": (150, CUTS, damaged_classes),
    "folders": (250, FILES, odd_folders),
    "Parquet": (220, st.tuples(EDITS, st.just([]) | CUTS), damaged_parquet),
    "subtitles of a video": (100, CUTS, damaged_subtitles),
    "subtitles": (1130, CUTS, damaged_srt),
    "tar": (50, st.tuples(EDITS, st.just([]) | CUTS), damaged_tar),
    "TOML text": (50, st.tuples(st.integers(0, 50), TOML_CUTS), damaged_toml),
    "TOML settings": (50, EDITS, damaged_settings),
    "overrides": (50, OVERRIDES, odd_overrides),
}
"""How many inputs of a kind are tried, what they are drawn from, and what reads one."""


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs(tmp_path: Path, count: Callable[[int], int], kind: str) -> None:
    root = tmp_path / "root"
    for name in ("a.mp4", "0.jpg", "1.jpg", "frames/1.jpg", "frames/2.jpg", "7.webm"):
        write(root / name)
    (root / "labels.json").write_text(json.dumps(SSV2_LABELS))
    examples, strategy, body = KINDS[kind]

    @settings(
        max_examples=count(examples),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn=strategy)
    def run(drawn: Any) -> None:
        body(root, drawn)

    run()


def test_an_unknown_key_with_a_line_break_in_a_typed_part(tmp_path: Path) -> None:
    damaged_records("messages", tmp_path, ([("copy", 36, None, "<image>\n")], False))
