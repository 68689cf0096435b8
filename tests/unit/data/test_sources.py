"""Readers of records: what real files hold, what users get wrong, and anything that JSON can say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vft.data.formats as formats
from tests.helpers.formats import error_of, sample_of, write
from tests.helpers.formats import read_source as read
from vft.common.errors import UserError
from vft.common.task import Question
from vft.common.types import MediaOptions, MediaRef, Sample
from vft.config.data import DataConfig, SourceConfig
from vft.data.records.files import read_json
from vft.data.records.paths import resolve_media
from vft.data.records.record import BadRecord, RecordError
from vft.inference.requests import read_requests


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ANSWER = {"role": "assistant", "content": "A cat."}


def read_one(tmp_path: Path, record: Any, format: str = "messages") -> Sample:
    return sample_of(read(format, write(tmp_path / "train.json", [record]), tmp_path))


def fail_one(tmp_path: Path, record: Any, format: str = "messages") -> BadRecord:
    return error_of(read(format, write(tmp_path / "train.json", [record]), tmp_path))


def parts_of(sample: Sample, tmp_path: Path) -> list[list[Any]]:
    """Parts with media as (kind, path relative to the root)."""

    def name(path: Path) -> str:
        return path.relative_to(tmp_path.resolve()).as_posix()

    def plain(part: Any) -> Any:
        if not isinstance(part, MediaRef):
            return part
        return part.kind, name(part.path) if isinstance(part.path, Path) else tuple(name(one) for one in part.path)

    return [[plain(part) for part in turn.parts] for turn in sample.turns]


# ------------------------------------------------------------------------------------------------------------- JSON


def test_lines_of_a_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n[\n\n {"a": "x\\ny"},\n {"b":\n 2}, {"c": 3}\n]\n')
    assert list(read_json(path)) == [(4, {"a": "x\ny"}), (5, {"b": 2}), (6, {"c": 3})]


def test_lines_of_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\r\n{"b": 2}\r\n{\n"c": 3}')
    assert list(read_json(path)) == [(1, {"a": 1}), (3, {"b": 2}), (4, {"c": 3})]


@pytest.mark.parametrize("text", ["", " \n", "[]", "[ \n]"])
def test_nothing(tmp_path: Path, text: str) -> None:
    assert list(read_json(write(tmp_path / "a.json", text))) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n{"b": }]', 2),
        ('[{"a": 1},\n{"b": 1}', 2),
        ('[{"a": 1}\n\n{"b": 1}]', 3),
        ('[{"a": 1},\n]', 2),
        ('[{"a": 1}]\n\n{}', 3),
        ("id,video\n1,a.mp4", 1),
    ],
)
def test_malformed(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(UserError) as caught:
        list(read_json(path))
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ['{"b": 1', '{"b": NaN}', "[" * 100_000, '{"b": ' + "9" * 5000 + "}", "id,video"])
@pytest.mark.parametrize("after", ["", "\n", '\n{"c": 3}', '\n\n{"c": 3}\n'])
def test_a_malformed_line_is_one_bad_record(tmp_path: Path, text: str, after: str) -> None:
    """It costs itself, not the file; what follows keeps its line."""
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n' + text + after)
    records = list(read_json(path))
    assert records[0] == (1, {"a": 1})
    assert records[1][0] == 2 and isinstance(records[1][1], RecordError)
    assert [record for _, record in records[2:]] == ([{"c": 3}] if "c" in after else [])
    assert all(path.read_text().split("\n")[line - 1] == '{"c": 3}' for line, _ in records[2:])
    samples, bad = read("messages", path, tmp_path)
    assert not samples and str(bad[1]).startswith("a.jsonl:2: ") and len(str(bad[1]).splitlines()) == 1


# --------------------------------------------------------------------------------------------------------- messages


def test_llama_factory_demo(videos: Path) -> None:
    samples, bad = read("messages", videos / "mllm_video_demo.json", videos)
    assert not bad
    assert [sample.id for sample in samples] == [f"mllm_video_demo-{i}" for i in (1, 2, 3)]
    assert [sample.origin for sample in samples] == [f"mllm_video_demo.json:{i}" for i in (2, 17, 32)]
    media, question = samples[1].turns[0].parts
    assert media == MediaRef("video", (videos / "mllm_demo_data/2.avi").resolve(), field="videos[0]")
    assert question == "What is she doing?"
    assert samples[1].turns[1].text == "She is cooking."
    pictures, bad = read("messages", videos / "mllm_demo.json", videos)
    assert not bad and len(pictures) == 6
    assert [len([p for p in turn.parts if isinstance(p, MediaRef)]) for turn in pictures[0].turns] == [1, 0, 1, 0]


def test_typed_parts_with_options(tmp_path: Path) -> None:
    video = {"type": "video", "video": "a.mp4", "fps": 1.5, "max_frames": 8, "video_start": 0, "image": None}
    frames = {"type": "video", "video": ["0.jpg", "1.jpg"], "sample_fps": 4}
    url = {"type": "image_url", "image_url": {"url": "p.png"}}
    content = [video, {"type": "text", "text": "and <image> in HTML"}, frames, url]
    sample = read_one(tmp_path, {"id": 7, "messages": [user(content), ANSWER], "source": "web"})
    assert parts_of(sample, tmp_path) == [
        [("video", "a.mp4"), "and <image> in HTML", ("video", ("0.jpg", "1.jpg")), ("image", "p.png")],
        ["A cat."],
    ]
    media = [part for part in sample.turns[0].parts if isinstance(part, MediaRef)]
    assert media[0].options == MediaOptions(fps=1.5, max_frames=8, video_start=0)
    assert media[1].options == MediaOptions(sample_fps=4)
    assert media[0].field == "messages[0].content[0].video"
    assert (sample.id, sample.fields) == ("7", {"id": 7, "source": "web"})


def test_placeholders_and_typed_slots(tmp_path: Path) -> None:
    record = {
        "messages": [
            user("one <video>\nand <image>, frames <video>"),
            ANSWER,
            user([{"type": "image"}, {"type": "text", "text": "?"}]),
            ANSWER,
        ],
        "videos": ["a.mp4", ["0.jpg", "1.jpg"]],
        "images": ["p.png", "q.png"],
    }
    parts = parts_of(read_one(tmp_path, record), tmp_path)
    assert parts[0] == [
        "one ",
        ("video", "a.mp4"),
        "\nand ",
        ("image", "p.png"),
        ", frames ",
        ("video", ("0.jpg", "1.jpg")),
    ]
    assert parts[2] == [("image", "q.png"), "?"]


def test_placeholders_meant_as_text(tmp_path: Path) -> None:
    """Those of an answer are text, and so are those beside a typed part; what is refused names typed parts."""
    said = {"role": "assistant", "content": "A <video> in an <image>."}
    record = {"messages": [user("<video>What?"), said], "videos": ["a.mp4"]}
    assert parts_of(read_one(tmp_path, record), tmp_path) == [
        [("video", "a.mp4"), "What?"],
        ["A <video> in an <image>."],
    ]
    for typed, lists in (({"type": "video", "video": "a.mp4"}, {}), ({"type": "video"}, {"videos": ["a.mp4"]})):
        for text in ("Is it a <video>?", "An <image>?"):
            question = user([typed, {"type": "text", "text": text}])
            parts = parts_of(read_one(tmp_path, {"messages": [question, said], **lists}), tmp_path)
            assert parts == [[("video", "a.mp4"), text], ["A <video> in an <image>."]]
    alone = {"messages": [user([{"type": "text", "text": "A <video>?"}]), said]}
    assert parts_of(read_one(tmp_path, alone), tmp_path)[0] == ["A <video>?"]
    llava = {"from": "human", "value": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "<image>?"}]}
    sample = read_one(tmp_path, {"conversations": [llava, {"from": "gpt", "value": "<image>"}]})
    assert parts_of(sample, tmp_path) == [[("video", "a.mp4"), "<image>?"], ["<image>"]]
    for bad in (listing("<video>Is it a <video>?", "a.mp4"), {"messages": [user("A <video>?"), ANSWER]}):
        assert "typed parts" in fail_one(tmp_path, bad).message


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_under_a_key_of_its_own(tmp_path: Path, key: str) -> None:
    said = {"role": "assistant", "content": "One.", key: "I look.\n"}
    sample = read_one(tmp_path, {"messages": [user("?"), said]})
    assert sample.turns[1].text == "<think>\nI look.\n</think>\n\nOne."
    twice = fail_one(tmp_path, {"messages": [user("?"), {**said, "content": "<think>a</think>b"}]})
    assert twice.field == f"messages[1].{key}" and "keep one" in twice.message
    asked = fail_one(tmp_path, {"messages": [{**user("?"), key: "I ask."}, ANSWER]})
    assert asked.field == f"messages[0].{key}" and "only an answer" in asked.message
    assert read_one(tmp_path, {"messages": [user("?"), {**said, key: None}]}).turns[1].text == "One."


def test_no_placeholder_at_all(tmp_path: Path) -> None:
    record = {"messages": [{"role": "system", "content": "Be brief."}, user("What?"), ANSWER], "videos": ["a.mp4"]}
    assert parts_of(read_one(tmp_path, record), tmp_path)[:2] == [["Be brief."], [("video", "a.mp4"), "What?"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", [("video", "a.mp4"), "What?"]),
        ("What?\n<image>", ["What?", ("video", "a.mp4")]),
        ("<video>\nWhat?", [("video", "a.mp4"), "What?"]),
        ("What?", [("video", "a.mp4"), "What?"]),
    ],
)
def test_llava_layout(tmp_path: Path, text: str, expected: list[Any]) -> None:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A cat."}]
    sample = read_one(tmp_path, {"id": "x", "conversations": turns, "video": "a.mp4"})
    assert parts_of(sample, tmp_path) == [expected, ["A cat."]]
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]


def test_ids_are_unique(tmp_path: Path) -> None:
    records = [{"id": name, "messages": [user("?"), ANSWER]} for name in ("x", "x", "x#2", "x", None)]
    samples, _ = read("messages", write(tmp_path / "t.json", records), tmp_path)
    ids = [sample.id for sample in samples]
    assert ids[:2] == ["x", "x#2"] and ids[4] == "t-5" and len(set(ids)) == 5


def listing(text: str, *media: Any) -> dict[str, Any]:
    return {"messages": [user(text), ANSWER], "videos": list(media)}


def part(**keys: Any) -> dict[str, Any]:
    return {"messages": [user([{"type": "video", "video": "a.mp4", **keys}]), ANSWER]}


PART_0 = "messages[0].content[0]"


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    """Qwen's examples write `file:///...`."""
    (tmp_path / "a b.mp4").touch()
    root = tmp_path.resolve()
    assert resolve_media(root, f"file://{root}/a b.mp4", "video") == root / "a b.mp4"


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        (7, "", "7 is no JSON object"),
        ({"text": "?"}, "messages", "it has 'text'"),
        ({"prompt": "?"}, "answer", "it has 'prompt'"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "must be a list"),
        ({"messages": [user("?")]}, "messages", "no assistant turn"),
        ({"messages": [{"role": "bot", "content": "?"}]}, "messages[0].role", "unknown role 'bot'; allowed are system"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [user(3), ANSWER]}, "messages[0].content", "3 is of type int"),
        ({"messages": [user("?"), {"role": "assistant", "content": " "}]}, "messages[1]", "empty"),
        ({"messages": [user("\ud800"), ANSWER]}, "messages[0].content", "surrogate"),
        ({"messages": [user("?"), ANSWER], "id": ["x"]}, "id", "of type list"),
        (listing("<video><video>", "a.mp4"), "videos", "2 <video> placeholder(s) in the text but 1 video(s) listed"),
        (listing("<video>"), "videos", "1 <video> placeholder(s) in the text but 0"),
        (listing("<image>", "a") | {"images": ["b"]}, "videos", "0 <video> placeholder(s)"),
        (
            listing("?", "a") | {"messages": [{"role": "assistant", "content": "<video>"}]},
            "messages",
            "in an",
        ),
        (listing("<video>", 5), "videos[0]", "5 is of type int"),
        (listing("<video>", []), "videos[0]", "empty list"),
        (listing("<video>", "https://a.b/c.mp4"), "videos[0]", "URLs in records are off"),
        (listing("<video>", "file:///etc/passwd"), "videos[0]", "'/etc/passwd' leads to"),
        (listing("<video>", "file://host/c.mp4"), "videos[0]", "URLs in records are off"),
        (listing("<video>", "/etc/passwd"), "videos[0]", "out of data.root"),
        (listing("<video>", "../../x.mp4"), "videos[0]", "out of data.root"),
        (listing("<video>", "a\0b"), "videos[0]", "is no path"),
        (part(type="audio"), f"{PART_0}.type", "unknown type 'audio'"),
        (part(fsp=2), f"{PART_0}.fsp", "unknown key"),
        (part(fps=True), f"{PART_0}.fps", "True must be a number"),
        (part(nframes=2.5), f"{PART_0}.nframes", "whole number"),
        (part(type="image", video=None, image="a", fps=1), f"{PART_0}.fps", "unknown key"),
        (part() | {"videos": ["b"]}, "videos[0]", "keep one of the two"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, record: Any, field: str, message: str) -> None:
    bad = fail_one(tmp_path, record)
    assert (bad.origin, bad.field) == ("train.json:2", field)
    assert message in bad.message


def test_paths_through_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write(tmp_path / "out.mp4", "x")
    write(root / "in.mp4", "x")
    (root / "leak.mp4").symlink_to(tmp_path / "out.mp4")
    (root / "fine.mp4").symlink_to(root / "in.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    os.mkfifo(root / "fifo.mp4")
    names = ["leak.mp4", "fine.mp4", "fifo.mp4", ".", str(root / "in.mp4"), "gone.mp4", "loop.mp4"]
    records = [{"messages": [user("<video>"), ANSWER], "videos": [name]} for name in names]
    samples, bad = read("messages", write(root / "a.json", records), root)
    refs = [sample.turns[0].parts[0] for sample in samples]
    paths = [ref.path.name for ref in refs if isinstance(ref, MediaRef) and isinstance(ref.path, Path)]
    assert paths == ["in.mp4", "in.mp4", "gone.mp4", "loop.mp4"]  # what is missing is the index's to report
    assert "is no regular file" in bad[1].message and f"the folder {root} has no pictures" in bad[2].message
    assert "out of data.root" in bad[0].message


# ------------------------------------------------------------------------------------------------------ llava_video


def llava(video: str, data_source: str = "0_30_s_nextqa", **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": "<image>\nWhy? Please provide your answer."},
        {"from": "gpt", "value": "E. training."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "A man."},
    ]
    return {"id": "8968804598", "conversations": turns, "data_source": data_source, "video": video, **more}


def test_llava_video_folder(tmp_path: Path) -> None:
    folder = tmp_path / "0_30_s_activitynetqa"
    for name in ("direct/a.mp4", "0_30_s_activitynetqa/c/b.mp4", "0_30_s_nextqa/NextQA/d.mp4"):
        write(tmp_path / name, "x")
    for i in (10, 2, 1):
        write(tmp_path / f"hound/v/c{i}.jpeg", "x")
    write(tmp_path / "hound/v/notes.txt", "x")
    names = ["direct/a.mp4", "c/b.mp4", "NextQA/d.mp4", "gone.mp4", "hound/v"]
    write(folder / "x_oe.json", [llava(name) for name in names])
    write(folder / "sub" / "y_cap.json", [llava("direct/a.mp4"), {"id": "z", "video": "direct/a.mp4"}, {"id": "q"}])
    samples, bad = read("llava_video", folder, tmp_path)
    found = [parts_of(sample, tmp_path)[0] for sample in samples]
    assert [parts[0][1] for parts in found] == [
        "direct/a.mp4",
        "direct/a.mp4",
        "0_30_s_activitynetqa/c/b.mp4",
        "0_30_s_nextqa/NextQA/d.mp4",
        "gone.mp4",
        ("hound/v/c1.jpeg", "hound/v/c2.jpeg", "hound/v/c10.jpeg"),
    ]
    assert all(parts[1] == "Why? Please provide your answer." for parts in found)
    assert [turn.role for turn in samples[0].turns] == ["user", "assistant", "user", "assistant"]
    assert samples[0].origin == "sub/y_cap.json:2" and len({sample.id for sample in samples}) == 6
    assert [record.field for record in bad] == ["messages", "video"]


def test_predict_shows_what_training_shows_of_llava_video(tmp_path: Path) -> None:
    """Videos in the folder of the file or of `data_source`, and folders of frames; `messages` reads those too."""
    for name in ("x/0_30_s_nextqa/NextQA/d.mp4", "0_30_s_nextqa/N/e.mp4", "hound/v/c10.jpeg", "hound/v/c2.jpeg"):
        write(tmp_path / name, "x")
    path = write(tmp_path / "x" / "0_30_s_nextqa" / "x_oe.json", "")
    write(path, [llava(name) for name in ("NextQA/d.mp4", "N/e.mp4", "hound/v", "gone.mp4")])
    samples, bad = read("llava_video", path, tmp_path)
    asked = [item.question for item in read_requests([path], "?", tmp_path) if isinstance(item.question, Question)]
    assert not bad and [one.prompt.turns for one in asked] == [sample.turns[:-1] for sample in samples]
    shown = [one.prompt.media[0] for one in asked]
    assert [ref.is_folder for ref in shown] == [False, False, True, False]
    assert shown[2].path == tuple(tmp_path / f"hound/v/c{i}.jpeg" for i in (2, 10))
    own, _ = read("messages", write(tmp_path / "own.json", [llava("hound/v", data_source="")]), tmp_path)
    assert own[0].turns[0].parts[0] == shown[2]


def test_llava_video_mistakes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no pictures" in fail_one(tmp_path, llava("empty"), "llava_video").message
    assert fail_one(tmp_path, llava("a.mp4", data_source=["x"]), "llava_video").field == "data_source"
    with pytest.raises(UserError, match=r"no \.json files"):
        read("llava_video", tmp_path / "empty", tmp_path)


# ------------------------------------------------------------------------------------------------------------- fuzz


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet='[]{},:"\\ \n1truenI-.', max_size=40))
def test_any_text(tmp_path: Path, text: str) -> None:
    """Text that the standard library reads as a list gives the same records; the rest is a UserError or JSONL."""
    path = write(tmp_path / "fuzz.json", text)
    try:
        found = [record for _, record in read_json(path)]
    except UserError as error:
        assert str(error).startswith(f"{path}:")
        found = None
    try:
        expected = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(expected, list) and "NaN" not in text and "Infinity" not in text:
        assert found == expected


@pytest.mark.parametrize("mask", [{"weight": 0}, {"loss": False}])
def test_answers_that_others_would_mask_are_not_learnt_in_silence(tmp_path: Path, mask: dict[str, Any]) -> None:
    bad = fail_one(tmp_path, {"messages": [user("Hi"), {**ANSWER, **mask}]})
    assert bad.field == f"messages[1].{next(iter(mask))}"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.mp4", "x", "is no file of records"),
        ("a.tar", "x", "is an archive; unpack it"),
        ("a.csv", '{"video": "x.mp4"}', "holds JSON, not a table; name it"),
        ("a.json", '[\n// mine\n{"a": 1}]', "a.json:2: a comment, which JSON does not have"),
        ("a.jsonl", '# mine\n{"a": 1}', "a.jsonl:1: a comment, which JSON does not have"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(words)):
        read("messages", tmp_path / name, tmp_path)


def test_a_list_of_records_below_a_key(tmp_path: Path) -> None:
    record = {"messages": [user("Who?"), ANSWER]}
    error = fail_one(tmp_path, {"data": [record]})
    assert (error.field, error.message.partition(",")[0]) == ("data", "holds a list")
    error = fail_one(tmp_path, {"1": record, "2": record})
    assert (error.field, error.message.partition(";")[0]) == ("1", "records by name")


def test_a_source_named_from_above_its_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.json", [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"paths are below data.root: write 'a.json'"):
        formats.read(SourceConfig(format="messages", path="data/a.json"), DataConfig(root=Path("data")))


def test_an_answer_before_its_video(tmp_path: Path) -> None:
    """It would be learnt without the video being seen."""
    (tmp_path / "x.mp4").write_bytes(b"x")
    greeting = {"role": "assistant", "content": "Hello."}
    asks = user("<video>Who?")
    for messages in ([ANSWER, asks], [user("Hi."), greeting, asks]):
        error = fail_one(tmp_path, {"messages": messages, "videos": ["x.mp4"]})
        assert (error.field, error.message.partition(";")[0]) == (
            "messages",
            "no assistant turn follows the video or picture",
        )
    assert read_one(tmp_path, {"messages": [greeting, asks, ANSWER], "videos": ["x.mp4"]}).turns[0].role == "assistant"
