"""Records as people have them: tables, other trainers' keys, exports of Label Studio.

Compared with what csv, pyarrow and datasets wrote, and with records in the project's own form."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from tests.helpers.clips import make_clip
from tests.helpers.formats import error_of, read_error, read_messages, write
from vft.common.errors import UserError
from vft.common.task import Question
from vft.common.types import MediaOptions, MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats as sources
from vft.data.records.record import Records
from vft.inference.engine import Failure
from vft.inference.requests import read_requests


def read(path: Path, root: Path, format: str = "messages", **keys: Any) -> Records:
    source = SourceConfig(format=format, path=str(path.relative_to(root)), **keys)  # type: ignore[arg-type]
    return sources.read(source, DataConfig(root=root))


def said(records: Records) -> list[list[Any]]:
    """Turns of all samples: texts, and media as `kind:path`."""
    samples, bad = records
    assert not bad, str(bad[0])
    return [
        [
            f"{part.kind}:{part.path.name}" if isinstance(part, MediaRef) and isinstance(part.path, Path) else part
            for turn in sample.turns
            for part in turn.parts
        ]
        for sample in samples
    ]


def file_of(sample: Sample) -> Path:
    (path,) = (part.path for turn in sample.turns for part in turn.parts if isinstance(part, MediaRef))
    assert isinstance(path, Path)
    return path


def one(root: Path, record: Any, **keys: Any) -> list[Any]:
    (turns,) = said(read(write(root / "r.json", [record]), root, **keys))
    return turns


def bad(root: Path, record: Any, **keys: Any) -> str:
    return str(error_of(read(write(root / "r.json", [record]), root, **keys)))


# ---------------------------------------------------------------------------------------------------- CSV and TSV

ROWS = [["a.mp4", 'What, "now"?', "Two\nlines; and more"], ["b.MP4", "Où?", "Là, à Paris"], ["c.webm", "x\ty|z", "1"]]
HEADER = ["video", "question", "answer"]
EXPECTED = [[f"video:{video}", question, answer] for video, question, answer in ROWS]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_dialect_reads_as_csv_wrote_it(delimiter: str, ending: str, encoding: str, tmp_path: Path) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator=ending).writerows([HEADER, *ROWS])
    for name in ("r.csv", "r.tsv", "r.TSV"):
        path = write(tmp_path / name, text.getvalue().encode(encoding))
        records = read(path, tmp_path)
        assert said(records) == EXPECTED
        assert [sample.origin for sample in records[0]] == [f"{name}:2", f"{name}:4", f"{name}:5"]


def test_excels_own_first_line_and_spaces(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", 'sep=;\r\n Video ; Question;Answer\r\na.mp4 ; "q; r"; yes \r\n\r\n;;\r\n')
    records = read(path, tmp_path)
    assert said(records) == [["video:a.mp4", "q; r", "yes"]]
    assert records[0][0].origin == "r.csv:3"


def test_cells_that_say_that_there_is_nothing(tmp_path: Path) -> None:
    rows = [
        "video,question,answer",
        *(f"a.mp4,q,{cell}" for cell in ("nan", "NaN", "null", "NULL", "#N/A", "None", "no")),
    ]
    samples, bad = read(write(tmp_path / "r.csv", "\n".join(rows)), tmp_path)
    assert [sample.turns[1].text for sample in samples] == ["None", "no"] and len(bad) == 5


def test_cells_hold_lists_and_numbers(tmp_path: Path) -> None:
    table = """images,question,answer,options,fps,video_start
"[""a.jpg"", ""b.jpg""]",[1] or [2]?,[1],"['[1]', '[2]']",,
"""
    (sample,), _ = read(write(tmp_path / "r.csv", table), tmp_path)
    assert said(([sample], [])) == [["image:a.jpg", "image:b.jpg", "[1] or [2]?", "[1]"]]
    assert sample.fields["options"] == ["[1]", "[2]"]


def test_cells_say_how_media_are_shown(tmp_path: Path) -> None:
    """By the same keys as records of JSON; an empty cell says nothing."""
    table = "video,answer,start_time,end_time,maxFrames\na.mp4,x,6,9.5,8\na.mp4,x,,,\na.mp4,x,six,,\n"
    samples, (found,) = read(write(tmp_path / "r.csv", table), tmp_path)
    refs = [sample.turns[0].parts[0] for sample in samples]
    options = [ref.options for ref in refs if isinstance(ref, MediaRef)]
    assert options == [MediaOptions(video_start=6.0, video_end=9.5, max_frames=8), MediaOptions()]
    assert "r.csv:4: start_time: 'six' must be a number" in str(found)
    trimmed = 'video,answer,trim\na.mp4,x,"[6, 9]"\n'
    ((sample,), _) = read(write(tmp_path / "r.csv", trimmed), tmp_path)
    ref = sample.turns[0].parts[0]
    assert isinstance(ref, MediaRef) and ref.options == MediaOptions(video_start=6, video_end=9)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"video,question,answer\na.mp4,O\xf9?,x\n", ["r.csv:2", "not UTF-8", "iconv"]),
        ("v\0i\0d\0e\0o\0,\0a\0", ["r.csv", "zero bytes", "UTF-8"]),
        ("a.mp4,What?,x\nb.mp4,Who?,y\n", ["r.csv:1", "'a.mp4'", "video,question,answer"]),
        ('video,question,answer\na.mp4,"What?,x\n', ["r.csv:2", "quotes"]),
        ("video,answer,answer\na.mp4,x,y\n", ["r.csv:1", "'answer'", "rename"]),
        ("", ["r.csv", "column names"]),
    ],
)
def test_tables_that_cannot_be_read(table: Any, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", table)
    read_error(lambda: read(path, tmp_path), *words)


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    rows = ["video,question,answer,caption", "a.mp4,q,x,", "a.mp4,q,x", "a.mp4,q,,c", "a.mp4,q,x,y,z", "a.mp4,,x,", ""]
    samples, found = read(write(tmp_path / "r.csv", "\n".join(rows)), tmp_path)
    assert [sample.origin for sample in samples] == ["r.csv:2", "r.csv:6"]
    assert [one.origin for one in found] == ["r.csv:3", "r.csv:4", "r.csv:5"]
    assert "3 values under 4 columns" in str(found[0]) and "answer: is empty" in str(found[1])


# ------------------------------------------------------------------------------------------------------------- Parquet


def test_parquet_and_the_hubs_folders(tmp_path: Path) -> None:
    features = Features({"video": Value("string"), "label": ClassLabel(names=["run", "jump"]), "n": Value("float64")})
    rows = {"video": ["a.mp4", "b.mp4"], "label": [1, 0], "n": [float("nan"), 1.0]}
    table = Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "one.parquet")
    table.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    expected = [["video:a.mp4", "jump"], ["video:b.mp4", "run"]]
    for name, origin in (
        ("one.parquet", "one.parquet:1"),
        ("hub", "hub/data/train-00000-of-00001.parquet:1"),
        ("saved", "saved/data-00000-of-00001.arrow:1"),
    ):
        records = read(tmp_path / name, tmp_path)
        assert said(records) == expected
        assert records[0][0].origin == origin and records[0][0].fields["labels"] == ("jump", "run")


def test_splits_of_a_folder_are_not_mixed(tmp_path: Path) -> None:
    table = Dataset.from_dict({"video": ["a.mp4"], "answer": ["train"]})
    other = Dataset.from_dict({"video": ["a.mp4"], "answer": ["test"]})
    table.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    other.to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    DatasetDict(train=table, test=other).save_to_disk(tmp_path / "saved")
    for name in ("hub", "saved"):
        message = read_error(lambda name=name: read(tmp_path / name, tmp_path), "holds the splits test, train")
        mended = Path(message.split('"')[1])
        assert said(read(mended, tmp_path)) == [["video:a.mp4", "test"]]
    read_error(lambda: read(tmp_path / "hub/data/dev-*.parquet", tmp_path), "no file has such a name")


def test_a_table_that_holds_the_files_themselves(tmp_path: Path) -> None:
    # As the hub's tables have pictures; datasets itself would copy the file's content on the way.
    contents, names = (b"x", None, b"x", b"yy", b""), ("a.png", "a.png", "../../b.png", None, "/etc/passwd")
    rows = [
        {"image": {"path": name, "bytes": content}, "answer": "x", "image_path": "elsewhere/c.png"}
        for content, name in zip(contents, names, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    samples, (found,) = read_messages(tmp_path / "r.parquet", tmp_path, cache=tmp_path / "cache")
    assert str(found).startswith("r.parquet:2: image_path: names 'elsewhere/c.png'")  # there `image` is a path
    files = [file_of(sample) for sample in samples]
    assert [file.read_bytes() for file in files] == [b"x", b"x", b"yy", b""]
    assert files[0] == files[1] and len(set(files)) == 3
    assert {file.parent for file in files} == {tmp_path / "cache" / "files"}
    assert sorted((tmp_path / "cache" / "files").iterdir()) == sorted(set(files))  # nothing else, no half of a file
    assert not any(isinstance(value, dict) for sample in samples for value in sample.fields.values())


def test_a_file_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"video": {"bytes": b"abc", "path": None}, "answer": "x"}]), tmp_path / "r.parquet"
    )
    (sample,), _ = read_messages(tmp_path / "r.parquet", tmp_path, cache=tmp_path / "cache")
    file = file_of(sample)
    assert file.suffix == ".mp4"
    file.write_bytes(b"a")
    read_messages(tmp_path / "r.parquet", tmp_path, cache=tmp_path / "cache")
    assert file.read_bytes() == b"abc"
    for path in (file, file.parent):
        path.unlink() if path.is_file() else path.rmdir()
    file.parent.write_text("no folder")
    read_error(lambda: read_messages(tmp_path / "r.parquet", tmp_path, cache=tmp_path / "cache"), "data.cache_dir")


def test_files_in_records_that_are_no_table(tmp_path: Path) -> None:
    write(tmp_path / "r.json", json.dumps([{"image": {"bytes": "eHg=", "path": "a.png"}, "answer": "x"}]))
    _, (found,) = read_messages(tmp_path / "r.json", tmp_path, cache=tmp_path / "cache")
    assert str(found).startswith("r.json:1: image: holds the file itself")
    assert not (tmp_path / "cache").exists()


def test_damaged_tables(tmp_path: Path) -> None:
    for name in ("r.parquet", "r.arrow"):
        path = write(tmp_path / name, b"nothing of the kind")
        read_error(lambda path=path: read(path, tmp_path), str(path), "can't be read")
        path.write_bytes(b"")
        read_error(lambda path=path: read(path, tmp_path), str(path), "can't be read")
        read_error(lambda name=name: read(tmp_path / f"no{name}", tmp_path), "no such file")
    (tmp_path / "empty").mkdir()
    read_error(lambda: read(tmp_path / "empty", tmp_path), "empty", "name a file")


# ------------------------------------------------------------------------------------------------------ keys of others

V = {"video": "a.mp4"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "Describe.", "input": "", "output": "x", "videos": ["a.mp4"]}, ["Describe.", "x"]),
        ({"instruction": "Describe.", "input": "Briefly.", "output": "x", **V}, ["Describe.\nBriefly.", "x"]),
        ({"instruction": "<video>Describe.", "output": "x", "videos": ["a.mp4"]}, ["Describe.", "x"]),
        ({"query": "Describe.", "response": "x", "history": [], **V}, ["Describe.", "x"]),
        ({"query": "b", "response": "y", "history": [["a", "x"]], **V}, ["a", "x", "b", "y"]),
        ({"prompt": "Describe.", "completion": "x", "system": None, **V}, ["Describe.", "x"]),
        ({"Question": "Describe.", "Answer": "x", **V}, ["Describe.", "x"]),
        ({"problem": "Describe.", "solution": "x", **V}, ["Describe.", "x"]),
        ({"input": "Describe.", "target": "x", **V}, ["Describe.", "x"]),
        ({"question": "How many?", "answer": 3, **V}, ["How many?", "3"]),
        ({"question": "Q", "answer": "x", "caption": "c", "label": "l", **V}, ["Q", "x"]),
        ({"caption": "x", "label": "l", **V}, ["x"]),
        ({"text": "x", "video_path": "a.mp4"}, ["x"]),
        ({"answer": "x", "file_name": "a.mp4"}, ["x"]),
        ({"answer": None, "response": "x", "question": None, "query": "q", **V}, ["q", "x"]),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "x"}], **V},
         ["q", "x"]),
    ],
)  # fmt: skip
def test_the_usual_names(record: Any, expected: list[str], tmp_path: Path) -> None:
    assert one(tmp_path, record) == ["video:a.mp4", *expected]
    jsonl = write(tmp_path / "r.jsonl", json.dumps(record) + "\n")
    assert said(read(jsonl, tmp_path)) == [["video:a.mp4", *expected]]


def test_a_picture_under_a_name_for_any_file(tmp_path: Path) -> None:
    assert one(tmp_path, {"file_name": "a.JPG", "text": "x"}) == ["image:a.JPG", "x"]
    assert one(tmp_path, {"img_path": "a.jpg", "question": "q", "answer": "x"}) == ["image:a.jpg", "q", "x"]


def test_several_right_answers_are_a_sample_each(tmp_path: Path) -> None:
    for answers in (["x", "y", "x"], {"text": ["x", "y"], "answer_start": [1, 2]}, [{"answer": "x"}, {"answer": "y"}]):
        records = read(write(tmp_path / "r.json", [{"id": "7", "question": "q", "answers": answers, **V}]), tmp_path)
        assert said(records) == [["video:a.mp4", "q", "x"], ["video:a.mp4", "q", "y"]]
        assert [sample.id for sample in records[0]] == ["7", "7#2"]


@pytest.mark.parametrize("answer", [None, "", " \n", [], [""], ["x", None], {"text": []}])
def test_empty_answers_are_bad_records(answer: Any, tmp_path: Path) -> None:
    for record in ({"question": "q", "answer": answer, **V}, {"instruction": "q", "output": answer, **V}):
        assert "is empty" in bad(tmp_path, record)
    if not isinstance(answer, list | dict):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        assert "messages[1]" in bad(tmp_path, {"messages": turns, **V})
        turns = [*turns, {"role": "user", "content": "r"}, {"role": "assistant", "content": "x"}]
        assert "messages[1]" in bad(tmp_path, {"messages": turns, **V})


@pytest.mark.parametrize(
    ("record", "field", "words"),
    [
        ({"question": "q", "prompt": "p", "answer": "x"}, "prompt", "columns = { question"),
        ({"question": "q", "answer": "x", "response": "y"}, "response", "columns = { answer"),
        ({"question": "q"}, "answer", "columns = { answer"),
        ({"question": 3, "answer": "x"}, "question", "type int"),
        ({"question": "q", "answer": {"a": "x"}}, "answer", "type dict"),
        ({"question": "q", "answer": True}, "answer", "type bool"),
        ({"question": "q", "answer": 1.5}, "answer", "type float"),
        ({"question": "q", "captions": [{"start": 1, "text": "x"}]}, "captions[0]", "type dict"),
        ({"query": "q", "response": "x", "history": [["a"]]}, "history", "pairs"),
        ({"question": ["q"], "answer": "x"}, "question", "'role' and 'content'"),
    ],
)
def test_what_is_not_clear_names_the_mend(record: Any, field: str, words: str, tmp_path: Path) -> None:
    message = bad(tmp_path, {**record, **V})
    assert message.startswith(f"r.json:2: {field}: ") and words in message


def test_columns_of_other_names_are_all_asked_for(tmp_path: Path) -> None:
    message = bad(tmp_path, {"Datei": "a.mp4", "Klasse": "x"})
    assert "it has 'Datei', 'Klasse'" in message and 'columns = { video = "...", answer = "..." }' in message


def test_the_mend_for_two_answers_works(tmp_path: Path) -> None:
    record = {"question": "q", "answer": "x", "response": "y", **V}
    assert one(tmp_path, record, columns={"answer": "response"}) == ["video:a.mp4", "q", "y"]


# ------------------------------------------------------------------------------------------------------------- mapping


def test_columns_are_mapped_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = [{"p": "a.mp4", "q": "Q?", "a": "x", "answer": "not this", "s": "S", "n": "7"}]
    columns = {"video": "p", "question": "q", "answer": "a", "system": "s", "id": "n"}
    Dataset.from_list(rows).to_parquet(tmp_path / "r.parquet")
    table = io.StringIO(newline="")
    csv.writer(table).writerows([list(rows[0]), list(rows[0].values())])
    write(tmp_path / "r.csv", table.getvalue())
    write(tmp_path / "r.json", rows)
    write(tmp_path / "r.jsonl", json.dumps(rows[0]))
    for name in ("r.parquet", "r.csv", "r.json", "r.jsonl"):
        records = read(tmp_path / name, tmp_path, columns=columns)
        assert said(records) == [["S", "video:a.mp4", "Q?", "x"]] and records[0][0].id == "7"
        message = read_error(
            lambda name=name: read(tmp_path / name, tmp_path, columns={**columns, "answer": "Q"}), name
        )
        assert "columns.answer = 'Q': no record has it" in message and "'answer'" in message


def test_columns_of_stories_and_of_turns(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", 'clip,said,parts\na.mp4,x,"[{""start_s"": 0, ""end_s"": 1, ""text"": ""y""}]"\n')
    columns = {"video": "clip", "text": "said", "segments": "parts"}
    records = read(path, tmp_path, "story", columns=columns)
    assert said(records) == [["video:a.mp4", "x"]] and records[0][0].fields["segments"] == ((0.0, 1.0, "y"),)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]
    record = {"chat": turns, "clip": "a.mp4"}
    assert one(tmp_path, record, columns={"conversations": "chat", "video": "clip"}) == ["video:a.mp4", "q", "x"]


def test_mistakes_in_columns() -> None:
    for format, columns, words in (
        ("folders", {"video": "p"}, "goes with messages and story"),
        ("messages", {"vidoe": "p"}, "vidoe: is not known"),
        ("messages", {"answer": "a", "label": "b"}, "keep one"),
        ("messages", {"video": ""}, "columns"),
    ):
        with pytest.raises(ValueError, match=words):
            SourceConfig(format=format, path="x", columns=columns)  # type: ignore[arg-type]


def test_labels_are_a_closed_set(tmp_path: Path) -> None:
    path = write(tmp_path / "set/r.csv", "path,label\na.mp4,run\nb.mp4,jump\nc.mp4,run\n")
    samples, _ = read(path, tmp_path)
    assert [sample.fields["labels"] for sample in samples] == [("jump", "run")] * 3
    write(tmp_path / "set/classes.txt", "run\nwalk\n")
    samples, (found,) = read(path, tmp_path)
    assert [sample.fields["labels"] for sample in samples] == [("run", "walk")] * 2
    assert "r.csv:3: label: 'jump' is no label of classes.txt" in str(found)
    asked = write(tmp_path / "q.csv", "path,question,label\na.mp4,q,x\n")
    (sample,), _ = read(asked, tmp_path)
    assert "labels" not in sample.fields


# -------------------------------------------------------------------------------------------------------- Label Studio


def task(result: list[Any], **data: Any) -> dict[str, Any]:
    results = [{"from_name": name, "to_name": "v", "type": kind, "value": value} for name, kind, value in result]
    return {"id": 1, "annotations": [{"id": 9, "result": results}], "data": {"video": "/data/upload/1/a.mp4", **data}}


def test_label_studios_export(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", b"x")
    text = ("caption", "textarea", {"text": ["A dog."]})
    choice = ("kind", "choices", {"choices": ["run"]})
    assert one(tmp_path, task([text])) == ["video:a.mp4", "A dog."]
    (sample,), _ = read(write(tmp_path / "r.json", [task([choice])]), tmp_path)
    assert said(([sample], [])) == [["video:a.mp4", "run"]] and sample.fields["labels"] == ("run",)
    many = task([("kind", "choices", {"choices": ["run", "jump"]})], question="Which?")
    assert [turns[1:] for turns in said(read(write(tmp_path / "r.json", [many]), tmp_path))] == [
        ["Which?", "run"],
        ["Which?", "jump"],
    ]
    assert one(tmp_path, task([text, choice])) == ["video:a.mp4", "A dog."]
    assert one(tmp_path, task([text, choice]), columns={"label": "kind"}) == ["video:a.mp4", "run"]
    for record, words in (
        (task([("x", "textarea", {"text": ["1"]}), ("y", "textarea", {"text": ["2"]})]), "columns = { answer"),
        (task([("box", "videorectangle", {"sequence": []})]), "hold videorectangle alone"),
        ({**task([]), "annotations": []}, "export annotated tasks alone"),
        (task([("caption", "textarea", {"text": [""]})]), "is empty"),
    ):
        assert words in bad(tmp_path, record)


def test_skipped_tasks_are_left_out_and_can_be_asked_about(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", b"x")
    skipped, done = task([]), task([("caption", "textarea", {"text": ["A dog."]})])
    skipped["annotations"][0]["was_cancelled"] = True
    path = write(tmp_path / "r.json", [skipped, done, {**skipped, "id": 2}])
    assert said(read(path, tmp_path)) == [["video:a.mp4", "A dog."]]
    path = write(tmp_path / "new.json", [skipped, {**task([]), "annotations": []}])
    for request in read_requests([path], "What?", tmp_path):
        assert isinstance(request.question, Question) and not request.question.references
        assert request.question.prompt.turns[-1].text == "What?"


def test_label_studios_parts_are_frames_counted_from_1(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mp4", range(40))
    spans = ("tl", "timelinelabels", {"ranges": [{"start": 1, "end": 21}], "timelinelabels": ["Run"]})
    for record, end_s in ((task([spans]), 2.0), (task([spans], fps="20"), 1.0)):
        (sample,), found = read(write(tmp_path / "r.json", [record]), tmp_path)
        assert not found and sample.fields["labels"] == ("Run",) and sample.turns[1].text == "Run"
        options = sample.turns[0].parts[0].options
        assert (options.video_start, options.video_end, options.fps) == (0.0, end_s, None)
    minimal = {"video": "/data/upload/1/a.mp4", "id": 1, "annotator": 1, "annotation_id": 2, "tl": [spans[2]]}
    assert one(tmp_path, minimal) == ["video:a.mp4", "Run"]


def test_label_studios_json_min(tmp_path: Path) -> None:
    about = {"id": 1, "annotator": 1, "annotation_id": 2, "created_at": "x", "updated_at": "y", "lead_time": 1.5}
    local = {"video": "/data/local-files/?d=clips/a%20b.mp4", **about}
    assert one(tmp_path, {**local, "said": ["A dog."]}) == ["video:a b.mp4", "A dog."]
    assert one(tmp_path, {**local, "kind": {"choices": ["run"]}}) == ["video:a b.mp4", "run"]
    table = "video,id,kind,annotator,annotation_id\n/data/local-files/?d=clips/a.mp4,1,run,1,2\n"
    assert said(read(write(tmp_path / "r.csv", table), tmp_path)) == [["video:a.mp4", "run"]]


def test_where_uploads_lie(tmp_path: Path) -> None:
    def found(name: str) -> str:
        path = read(write(tmp_path / "r.json", [{"video": name, "answer": "x"}]), tmp_path)[0][0].turns[0].parts[0].path
        return str(path.relative_to(tmp_path.resolve()))

    for place in ("a.mp4", "3f2a1b4c-a.mp4", "upload/7/3f2a1b4c-a.mp4"):
        write(tmp_path / place, b"x")
        assert found("/data/upload/7/3f2a1b4c-a.mp4") == place
    write(tmp_path / "b.mp4", b"x")
    twice = [{"video": f"/data/upload/7/{mark}-b.mp4", "answer": "x"} for mark in ("00000000", "11111111")]
    samples, (wrong,) = read(write(tmp_path / "r.json", twice), tmp_path)
    assert len(samples) == 1 and "would both be 'b.mp4'" in str(wrong)


# ------------------------------------------------------------------------------------------------------------- predict


def test_predict_asks_the_same_of_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", "video,question,answer\na.mp4,What?,x\na.mp4,,\n")
    first, second = read_requests([path], "the prompt", None)
    assert not isinstance(first.question, Failure) and not isinstance(second.question, Failure)
    assert first.question.prompt.turns[-1].text == "What?" and first.question.references == ("x",)
    assert second.question.prompt.turns[-1].text == "the prompt" and second.question.references == ()
    Dataset.from_list([{"video": "a.mp4", "query": "What?", "response": "x"}]).to_parquet(tmp_path / "r.parquet")
    (item,) = read_requests([tmp_path / "r.parquet"], "p", None)
    assert not isinstance(item.question, Failure) and item.question.prompt.turns[-1].text == "What?"


# ----------------------------------------------------------------------------------------------------------- anything


@pytest.mark.parametrize("column", ["file_name", "video_file_name", "clip_file_name"])
def test_a_table_that_lies_among_its_files(tmp_path: Path, column: str) -> None:
    """The layout of videofolder (datasets' docs): names count from the folder of `metadata.csv` on, in predict too;
    those of other tables from data.root on, as does one that is there alone."""
    columns = {"video": column} if column[:4] == "clip" else {}
    for name in ("clips/train/1.mp4", "1.mp4", "clips/train/a/2.mp4", "clips/3.mp4", "4.mp4"):
        write(tmp_path / name)
    rows = f"{column},text\n1.mp4,One.\na/2.mp4,Two.\n../3.mp4,Three.\n4.mp4,Four.\n5.mp4,Five.\n"
    for table, wanted in (
        ("metadata", ["clips/train/1.mp4", "clips/train/a/2.mp4", "clips/3.mp4", "4.mp4", "clips/train/5.mp4"]),
        ("clips", ["1.mp4", "a/2.mp4", "", "4.mp4", "5.mp4"]),
    ):
        path = tmp_path / "clips" / "train" / f"{table}.csv"
        path.write_text(rows)
        samples, bad = read_messages(path, tmp_path, columns=columns)
        media = [sample.turns[0].parts[0] for sample in samples]
        assert [ref.name for ref in media if isinstance(ref, MediaRef)] == [str(tmp_path / n) for n in wanted if n]
        assert len(bad) == wanted.count("")
        requests = read_requests([path], "?", tmp_path, columns)
        asked = [one.question for one in requests if isinstance(one.question, Question)]
        assert [one.prompt.media for one in asked] == [(ref,) for ref in media]


@pytest.mark.parametrize(
    ("path", "origins"),
    [
        ("a/train.csv", ["a/train.csv:2"]),
        ("a/train*.csv", ["a/train.csv:2", "a/train-2.csv:2"]),
        ("a/set/train", ["a/set/train/train-00.parquet:1"]),
    ],
)
def test_an_origin_is_a_place_below_the_root(tmp_path: Path, path: str, origins: list[str]) -> None:
    for name in ("a/train.csv", "a/train-2.csv", "a/set/train/notes.txt"):
        write(tmp_path / name, "video,text\nx.mp4,One.\n")
    pq.write_table(pa.table({"video": ["x.mp4"], "text": ["One."]}), tmp_path / "a/set/train/train-00.parquet")
    samples, bad = sources.read(SourceConfig(format="messages", path=path), DataConfig(root=tmp_path))
    assert not bad and sorted(sample.origin for sample in samples) == sorted(origins)


def test_a_workbook_is_to_be_saved_as_a_table(tmp_path: Path) -> None:
    write(tmp_path / "clips.XLSX", "PK")
    read_error(lambda: read(tmp_path / "clips.XLSX", tmp_path), "is a workbook", "save its sheet as CSV UTF-8")
    with pytest.raises(UserError, match="save its sheet as CSV UTF-8"):
        read_requests([tmp_path / "clips.XLSX"], "?", tmp_path)
