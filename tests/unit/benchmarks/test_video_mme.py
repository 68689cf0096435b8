"""Video-MME by name, with and without subtitles, and the official rule for letters beside another writing of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, asked, read, write_empty, write_parquet
from vft import benchmarks
from vft.data.media.timed_text import Subtitles

PLAIN, SUBTITLED = benchmarks.find("video_mme"), benchmarks.find("video_mme_subtitles")
TEXTS = [
    "A", "B.", "(C)", "D. 3.", "The best answer is: B", "The best answer is B", "Answer: C", "Best answer: C", "",
    "none",
    "All of them", "The correct answer is (D).", "The correct option is C", "a", "E", "Option: A", "it is option B",
    "The answer D", "The video shows a dog. Best is C", "\n\nB\n", "**C**", "I do not know", "Because of D", "C or D",
    "[D]",
    "Do it", "The best option isThe correct option isD",
    "The answer is that there are four of them in this long text b",
    "<A>", "Cats", "The correct answer A", "answer: b", "The best option is B", "B)", "none of the above, so D", "A/B",
]  # fmt: skip
SRT = '1\n00:00:00,500 --> 00:00:02,000\n<font color="white" size=".72c">Hello</font>\n'


def letter(text: str) -> str:
    """As the script: phrases out, then the first of the letters."""
    text = text.strip()
    for phrase in [
        "The best answer is", "The correct answer is", "The answer is", "The answer",
        "The best option is" "The correct option is", "Best answer:" "Best option:", "Answer:", "Option:",
        "The correct answer", "The correct option",
    ]:  # fmt: skip
        text = "".join(text.split(phrase))
    found = re.search(r"[ABCD]", text)
    return found[0] if found else ""


def row(i: int, **changes: Any) -> dict[str, Any]:
    groups = {"duration": ["short", "medium", "long"][i % 3], "domain": ["Knowledge", "Film & Television"][i % 2]}
    return {
        "video_id": f"{i // 3:03}", **groups, "sub_category": "Law", "url": "u", "videoID": f"v{i // 3}",
        "question_id": f"{i // 3:03}-{i % 3 + 1}", "task_type": ["OCR Problems", "Action Reasoning"][i % 2],
        "question": f"How many {i}?", "options": ["A. 1.", "B. 4.", "C. 2.", "D. 3."], "answer": "ABCD"[i % 4],
        **changes,
    }  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "Video-MME"
    write_parquet(folder / "videomme" / "test-00000-of-00001.parquet", [row(i) for i in range(len(TEXTS))])
    write_empty(folder / "data" / "v0.mp4", folder / "data" / "v1.MP4", folder / "data" / "v2.mkv")
    (folder / "subtitle").mkdir()
    (folder / "subtitle" / "v0.srt").write_text(SRT)
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(PLAIN, root)
    assert not bad and len(samples) == len(TEXTS)
    video, text = samples[0].turns[0].parts
    assert text == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nHow many 0?\nA. 1.\nB. 4.\nC. 2.\nD. 3.\nThe best answer is:"
    )
    assert video.path.name == "v0.mp4"
    assert [samples[i].turns[0].parts[0].path.name for i in (3, 6)] == ["v1.MP4", "v2.mkv"]


def test_subtitles(root: Path) -> None:
    samples, bad = read(SUBTITLED, root)
    assert not bad
    _, subtitles, text = samples[0].turns[0].parts
    assert subtitles == Subtitles(((0.5, 2.0, "Hello"),))
    assert text.startswith(
        "Select the best answer to the following multiple-choice question based on the video and the "
    )
    assert len(samples[3].turns[0].parts) == 2  # a video without subtitles


def test_scores(root: Path) -> None:
    samples, _ = read(PLAIN, root)
    scores = PLAIN.score(answered(PLAIN, samples, TEXTS))
    right = [float(letter(t) == one.references[0]) for t, one in zip(TEXTS, asked(PLAIN, samples), strict=True)]
    assert scores["accuracy"].value == pytest.approx(sum(right) / len(right)) and sum(right) > 5
    for key, value in (("duration", "long"), ("domain", "Knowledge"), ("task_type", "OCR Problems")):
        own = [r for r, one in zip(right, samples, strict=True) if one.fields["groups"][key] == value]
        assert scores[f"accuracy/{key}/{value}"].value == pytest.approx(sum(own) / len(own))


@pytest.mark.parametrize("text", TEXTS)
def test_letters(text: str) -> None:
    assert PLAIN.letter_of(text, 4) == (letter(text) or None)


def test_bad_records(root: Path) -> None:
    rows = [row(0), row(1, answer="E"), row(2, options=["1", "2"]), row(3, videoID=None)]
    write_parquet(root / "Video-MME" / "videomme" / "test-00000-of-00001.parquet", rows)
    samples, bad = read(PLAIN, root)
    name = "Video-MME/videomme/test-00000-of-00001.parquet"
    assert len(samples) == 1
    for number, (message, field) in enumerate(zip(bad, ("answer", "options", "videoID"), strict=True), 2):
        assert message.startswith(f"{name}:{number}: {field}: ")
