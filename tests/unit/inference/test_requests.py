"""Files, folders and records as questions, and long videos as questions about their parts."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.formats import read_story
from tests.helpers.tiny import LIMITS, Tiny
from vft.common.errors import UserError
from vft.common.task import Question
from vft.common.types import MediaInfo, MediaOptions, MediaRef
from vft.data.media.errors import MediaError
from vft.inference.engine import Answerer, Failure
from vft.inference.generate import TextStreamer
from vft.inference.requests import Request, read_requests, split
from vft.recipes.story import Story

CLIP = {"video": "clip.mp4"}


def question(item: Request) -> Question:
    assert isinstance(item.question, Question), item.question
    return item.question


def records(folder: Path, *lines: Any, name: str = "ask.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_a_folder_is_all_that_can_be_seen_below_it(tmp_path: Path) -> None:
    """Sorted, pictures too; other and hidden files aren't; a link that leads out is an error of its own."""
    outside = tmp_path / "outside.mp4"
    outside.touch()
    folder = tmp_path / "clips"
    for name in ("b.MP4", "a/2.jpg", "a/10.webm", ".hidden.mp4", "notes.txt", ".git/x.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "c.mp4").symlink_to(outside)
    items = read_requests([folder], "What?", None)
    assert [item.id for item in items] == [str(folder / name) for name in ("b.MP4", "c.mp4", "a/10.webm", "a/2.jpg")]
    link = items.pop(1).question
    assert isinstance(link, Failure) and link.reason == "record" and str(outside) in link.message
    assert [question(item).prompt.media[0].kind for item in items] == ["video", "video", "image"]
    assert all(question(item).prompt.turns[-1].text == "What?" for item in items)


def test_records_ask_what_training_data_ask(tmp_path: Path) -> None:
    """The last answer is the reference; what has no question of its own is asked the prompt."""
    video = "<video>Who is it?"
    asked = {"role": "user", "content": video}
    path = records(
        tmp_path,
        {"id": "known", "messages": [asked, {"role": "assistant", "content": "A dog."}], "videos": ["clip.mp4"]},
        {"id": "open", "messages": [asked], "videos": ["clip.mp4"]},
        {**CLIP, "prompt": "How many?"},
        CLIP,
        {"messages": [{"role": "user", "content": "<video>"}], **CLIP},
        {"prompt": "Two and two?"},
        {"conversations": [{"from": "human", "value": "<image>\nWhich?"}], "image": "still.png"},
    )
    items = read_requests([path], "Describe it.", None)
    assert [item.id for item in items] == ["known", "open", *(f"ask-{number}" for number in (3, 4, 5, 6, 7))]
    found = [question(item) for item in items]
    texts = ["Who is it?"] * 2 + ["How many?", "Describe it.", "Describe it.", "Two and two?", "Which?"]
    assert [one.prompt.turns[-1].text for one in found] == texts
    assert [one.references for one in found] == [("A dog.",), *[()] * 6]
    assert [len(one.prompt.turns) for one in found] == [1] * 7
    assert [ref.path for one in found for ref in one.prompt.media] == [tmp_path / "clip.mp4"] * 5 + [
        tmp_path / "still.png"
    ]


def test_a_record_is_read_as_in_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Question, system, trim and speech, by the reader of `messages` or of `story`; what is not read is told."""
    caplog.set_level("INFO")
    path = records(
        tmp_path,
        {**CLIP, "question": "Who?", "answer": "A dog.", "system": "Be brief.", "start": 1, "end": 2, "year": 1},
        {**CLIP, "query": "Who?", "fps": 1.0, "year": 2},
        {**CLIP, "instruction": "Say", "input": "who.", "output": "A dog."},
        {**CLIP, "text": "A dog runs.", "speech": "Run!", "video_end": 2},
        {**CLIP, "answer": "A dog."},
    )
    items = read_requests([path], "Describe it.", None)
    found = [question(item) for item in items]
    last = [one.prompt.turns[-1].text for one in found]
    assert last == ["Who?", "Who?", "Say\nwho.", "Describe it.\nWhat is said: Run!", "Describe it."]
    assert [item.asks for item in items] == [True, True, True, False, False]
    assert [one.references for one in found] == [("A dog.",), (), ("A dog.",), ("A dog runs.",), ("A dog.",)]
    assert [turn.text for turn in found[0].prompt.turns] == ["Be brief.", "Who?"]
    assert [one.prompt.media[0].options for one in found[:2]] == [
        MediaOptions(video_start=1, video_end=2),
        MediaOptions(fps=1.0),
    ]
    assert found[3].prompt.media[0].options == MediaOptions(video_end=2)
    assert caplog.messages == [f"{path}: keys that are not read, of 5 records: year (2)"]


def test_a_storys_own_question_is_asked_as_trained(tmp_path: Path) -> None:
    """With what is said in the video, where the record has that, as the story and summary tasks train it."""
    told = {**CLIP, "text": "A dog runs."}
    records_ = [
        {**told, "question": "Who runs?"},
        {**told, "prompt": "Who runs?", "speech": "Run!"},
        {**told, "query": "Who?", "segments": [{"start_s": 0, "end_s": 1, "text": "It runs."}]},
    ]
    path = records(tmp_path, *records_)
    samples, bad = read_story(path, tmp_path)
    trained = [Story().conversations(sample)[0] for sample in samples]
    items = read_requests([path], "Describe it.", None)
    assert [one.turns[0].text for one in trained] == ["Who runs?", "Who runs?\nWhat is said: Run!", "Who?"]
    assert [question(item).prompt.turns for item in items] == [one.turns[:1] for one in trained]
    assert not bad and all(item.asks for item in items) and not any(sample.unread for sample in samples)


def test_turns_before_the_question_stay(tmp_path: Path) -> None:
    turns = [("user", "<video>Who?"), ("assistant", "A dog."), ("user", "What colour?"), ("assistant", "Brown.")]
    said = [{"role": role, "content": text} for role, text in turns]
    (item,) = read_requests([records(tmp_path, {"messages": said, **CLIP})], "?", None)
    assert [turn.text for turn in question(item).prompt.turns] == ["Who?", "A dog.", "What colour?"]
    assert question(item).references == ("Brown.",)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"video": "../secret.mp4"}, "video: '../secret.mp4' leads to"),
        ({"video": "http://x.org/a.mp4"}, "video: 'http://x.org/a.mp4': URLs"),
        ({"prompt": 3, **CLIP}, "prompt: 3 is of type int"),
        (
            {"messages": [{"role": "user", "content": "?"}], "clip": "clip.mp4"},
            "clip: names 'clip.mp4' under a key that",
        ),
        ({"question": "?", "query": "!", **CLIP}, "query: may be the question as well as 'question'"),
        ({"question": "?", **CLIP, "start": 2, "end": 1}, "start: 2 is above end = 1"),
        ({"text": "x"}, "messages: is missing"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "messages: the last turn but an answer"),
        ("{oops", "Expecting property name"),
    ],
)
def test_a_bad_record_is_one_failure(tmp_path: Path, record: Any, told: str) -> None:
    path = records(tmp_path, {**CLIP, "prompt": "?"}, record, {**CLIP, "prompt": "!"})
    first, bad, last = read_requests([path], "?", None)
    assert isinstance(bad.question, Failure) and bad.question.reason == "record"
    assert bad.question.message.startswith(f"{path}:2: ") and told in bad.question.message
    assert [question(one).prompt.turns[-1].text for one in (first, last)] == ["?", "!"]


def test_where_media_lie(tmp_path: Path) -> None:
    """Beside the records, or below --root and nowhere else."""
    elsewhere = tmp_path / "media"
    elsewhere.mkdir()
    path = records(tmp_path, CLIP, {"video": "../clip.mp4"})
    inside, outside = read_requests([path], "?", elsewhere)
    assert question(inside).prompt.media[0].path == elsewhere / "clip.mp4"
    assert isinstance(outside.question, Failure)


def test_nothing_to_ask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no videos or pictures"):
        read_requests([tmp_path], "?", None)
    with pytest.raises(UserError, match="holds no records"):
        read_requests([records(tmp_path)], "?", None)
    with pytest.raises(UserError, match="no such file"):
        read_requests([tmp_path / "none.jsonl"], "?", None)


def test_ids_differ(tmp_path: Path) -> None:
    path = records(tmp_path, {"id": "a", **CLIP}, {"id": "a", **CLIP})
    clip = tmp_path / "clip.mp4"
    items = read_requests([path, clip, path, clip], "?", None)
    assert len({item.id for item in items}) == 6


# --------------------------------------------------------------------------------------------------------- segments


@pytest.mark.parametrize("fps", [30.0, 29.97, 12.5])
@pytest.mark.parametrize("length_s", [10.0, 3.3, 0.7])
@pytest.mark.parametrize("varies", [False, True])
def test_each_frame_is_in_one_segment(tiny: Tiny, fps: float, length_s: float, varies: bool) -> None:
    times_s = tuple(index / fps for index in range(1000)) if varies else None
    info = MediaInfo("video", 56, 56, 1000, fps, duration_s=1000 / fps, times_s=times_s)
    ref = MediaRef("video", Path("long.mp4"))
    parts = split([item_about(ref)], length_s, lambda _: info)
    frames: list[int] = []
    for part in parts:
        options = question(part).prompt.media[0].options
        limits = replace(LIMITS, frames=1000, start_s=options.video_start, end_s=options.video_end)
        seen = tiny.encoder.processor.plan(ref, info, limits).frame_indices
        assert part.segment_s is not None and seen
        assert all(part.segment_s[0] - 1e-3 <= index / fps <= part.segment_s[1] + 1e-3 for index in seen)
        frames += seen
    assert frames == list(range(1000))
    times = [part.segment_s for part in parts if part.segment_s is not None]
    assert times[0][0] == 0 and times[-1][1] == pytest.approx(1000 / fps)
    assert all(before[1] == pytest.approx(after[0]) for before, after in pairwise(times))


def item_about(*refs: MediaRef) -> Request:
    """The question that a file asks."""
    (item,) = read_requests([refs[0].path], "?", None) if isinstance(refs[0].path, Path) else ()
    asked = question(item)
    turn = replace(asked.prompt.turns[0], parts=(*refs, "?"))
    return replace(item, question=replace(asked, prompt=replace(asked.prompt, turns=(turn,))))


def test_segments_of_what_is_trimmed_already() -> None:
    ref = MediaRef("video", Path("long.mp4"), MediaOptions(video_start=5.0, video_end=14.0))
    info = MediaInfo("video", 56, 56, 300, 10.0, duration_s=30.0)
    parts = split([item_about(ref)], 4.0, lambda _: info)
    assert [part.segment_s for part in parts] == [(5.0, 9.0), (9.0, 13.0), (13.0, 14.0)]
    first, last = (question(part).prompt.media[0].options for part in (parts[0], parts[-1]))
    assert first.video_start == 5.0 and last.video_end == 14.0


def test_a_short_end_belongs_to_the_segment_before_it() -> None:
    info = MediaInfo("video", 56, 56, 205, 10.0, duration_s=20.5)
    parts = split([item_about(MediaRef("video", Path("long.mp4")))], 10.0, lambda _: info)
    assert [part.segment_s for part in parts] == [(0.0, 10.0), (10.0, 20.5)]


def test_what_has_no_segments() -> None:
    """Pictures are asked about whole; several videos in one question are refused; a bad file keeps its own error."""
    picture, video = MediaRef("image", Path("a.png")), MediaRef("video", Path("a.mp4"))

    def missing(ref: MediaRef) -> MediaInfo:
        raise MediaError("missing", "a.mp4: no such file")

    still, two, bad = split([item_about(picture), item_about(video, video), item_about(video)], 10.0, missing)
    assert still.segment_s is None and question(still).prompt.media == (picture,)
    assert isinstance(two.question, Failure) and "2 videos" in two.question.message
    assert question(bad).prompt.media == (video,)


def test_times_outside_the_video_are_the_records_fault() -> None:
    """As in training, and not that the question does not fit; parts of what is not there are not asked about."""
    ref = MediaRef("video", Path("long.mp4"), MediaOptions(video_start=5.0, video_end=90.0))
    info = MediaInfo("video", 56, 56, 300, 10.0, duration_s=30.0)
    (item,) = split([item_about(ref)], 4.0, lambda _: info)
    assert item.segment_s is None
    answerer = object.__new__(Answerer)
    answerer.info = lambda _: info
    failure = answerer.start(question(item), 1)
    assert isinstance(failure, Failure) and failure.reason == "record"
    assert "5 to 90 s is outside the video, which has 300 frames in 30.00 s" in failure.message


# -------------------------------------------------------------------------------------------------- text as it comes


@pytest.mark.parametrize("text", ["A red bar walks.", "狗在海滩上奔跑 🐕‍🦺🏖️ — naïve", "  two  spaces\n\nlines "])
def test_text_comes_in_whole_characters(tiny: Tiny, text: str) -> None:
    tokenizer = tiny.encoder.tokenizer
    # Byte by byte, as a byte-level tokenizer may have it: most characters are cut in several tokens.
    ids = [token for byte in text.encode() for token in tokenizer.convert_tokens_to_ids([byte_token(byte)])]
    assert tokenizer.decode(ids) == text
    pieces: list[str] = []
    stream = TextStreamer(lambda some: str(tokenizer.decode(some, skip_special_tokens=True)), pieces.append)
    for token in ids:
        stream.put([token])
    stream.put([None])
    stream.end(text)
    assert [piece for piece in pieces if piece] == list(text)


def byte_token(byte: int) -> str:
    """GPT-2's letter for a byte (Radford et al. 2019, encoder.py): printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))


def test_keys_have_the_names_that_columns_say(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("n,p,q\nfirst,a.mp4,What?\n")
    (item,) = read_requests([path], "?", None, {"video": "p", "question": "q", "id": "n"})
    assert not isinstance(item.question, Failure) and item.id == "first"
    assert item.question.prompt.turns[-1].text == "What?" and item.question.prompt.media[0].path == tmp_path / "a.mp4"
    with pytest.raises(UserError, match=r"columns\.video = 'x': no record has it"):
        read_requests([path], "?", None, {"video": "x"})
