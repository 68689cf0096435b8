"""TempCompass in its published layout; its rules beside another writing; predictions as its own scripts read them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, read, write_parquet
from vft import benchmarks

TEMPCOMPASS = benchmarks.find("tempcompass")
CHOICE = "What does she do?\nA. running\nB. walking\nC.Both at once\n D. sitting"
CAPTIONS = [
    "Which fits?\nSentence A: She runs.\nSentence B: She walks",
    "Which fits?\nOption 1: She runs.\nOption 2: It is (a) fast",
]
INFORMATION = (
    "Write a caption.\nInformation A: {'subject': 'man'}\nInformation B: {'subject': 'dog'}\nGenerated Caption:"
)
TEXTS = {
    "multi-choice": [
        "A", "B.", "B. walking", "B) walking", "(B)", "A. running", "running", "C.Both at once", "B: walking", "AB", "",
        "D. sitting", " B ", "no", "The answer is B", "b", "A because", "A.running", "D)", "B\n", "B walking", "yes",
    ],
    "yes_no": [
        "yes", "no", "Yes, she does.", "NO", "No idea", "She does", "nothing", "yesterday", "", "A", " Yes", "not yet",
        "I say yes", "YES!", "No.", "Not sure", "yes or no", "It is", "n", "no\nyes", "Yes.", "(no)",
    ],
    "caption_matching": [
        "Sentence A", "Sentence A.", "A", "A.", "She runs.", "She runs", "Sentence A: She runs.", "(A) She runs.", "B",
        "Option 1", "1", "1.", "Option 2: It is (a) fast", "It is (a) fast", "2) It is (a) fast", "She walks", "Option",
        "Sentence B: She walks", "Option 1: She runs", "Caption A", "a", "Sentence  A",
    ],
}  # fmt: skip


def rating(task: str, text: str, question: str, answer: str) -> int | None:
    """By the public rules: whether the answer is right, None if no rule matches the text."""
    text = text.strip()
    if task == "yes_no":
        said = [word for word in ("yes", "no") if text.lower().startswith(word)]
        return int(said == [answer]) if said else None
    if task == "multi-choice":
        if text == answer:
            return 1
        opens = text[:1] in ("A", "B", "C", "D") and (len(text) == 1 or text[1] in ".)")
        return int(text[0] == answer[0]) if opens else None
    lines = question.split("\n")[1:]
    spoken = None
    for line in lines:
        spoken = line if line == text else spoken
    for line in lines:
        sentence = line.split(": ")[1]
        spoken = sentence if sentence == text or (") " in text and text.split(") ")[1] == sentence) else spoken
    for name in [line.split(": ")[0] for line in lines] + [line.split(": ")[0].split(" ")[1] for line in lines]:
        spoken = name if name in (text, text.replace(".", "")) else spoken
    head, _, tail = answer.partition(": ")
    return None if spoken is None else int(spoken in (answer, head, tail, head.split()[1]))


def rows(task: str) -> list[dict[str, Any]]:
    """A question for each text; the answers take turns."""
    made = []
    for i in range(22):
        if task == "multi-choice":
            one = {"question": CHOICE, "answer": ["A. running", "B. walking", "C.Both at once", "D. sitting"][i % 4]}
        elif task == "yes_no":
            one = {"question": f"Does she run? {i}", "answer": ["yes", "no"][i % 2]}
        elif task == "caption_matching":
            one = {"question": CAPTIONS[i // 9 % 2], "answer": CAPTIONS[i // 9 % 2].split("\n")[1 + i % 2]}
        else:
            one = {"question": INFORMATION, "answer": "B. dog", "mc_question": "Who?\nA. dog", "mc_answer": "A. dog"}
        made.append({"video_id": ["10_reverse", "10"][i % 2], "dim": ["speed", "order"][i // 11], **one})
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for task in (*TEXTS, "captioning"):
        write_parquet(tmp_path / f"TempCompass/{task}/test-00000-of-00001.parquet", rows(task))
    (tmp_path / "TempCompass/videos").mkdir()
    for name in ("10", "10_reverse"):
        (tmp_path / f"TempCompass/videos/{name}.mp4").write_bytes(b"")
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(TEMPCOMPASS, root)
    assert not bad and len(samples) == 88
    first = {one.fields["task"]: one for one in samples[::-1]}
    best = "\nPlease directly give the best option:"
    asked = {task: one.turns[0].parts[1] for task, one in first.items()}
    assert asked == {
        "multi-choice": CHOICE + best,
        "yes_no": "Does she run? 0\nPlease answer yes or no:",
        "caption_matching": CAPTIONS[0] + best,
        "captioning": INFORMATION,
    }
    assert {task: (one.fields["options"], one.turns[1].text) for task, one in first.items()} == {
        "multi-choice": (("A", "B", "C", "D"), "A"),
        "yes_no": (("yes", "no"), "yes"),
        "caption_matching": (("Sentence A", "Sentence B"), "Sentence A"),
        "captioning": ((), "B. dog"),
    }
    assert first["yes_no"].turns[0].parts[0].path == root / "TempCompass/videos/10_reverse.mp4"


def test_scores(root: Path) -> None:
    samples, _ = read(TEMPCOMPASS, root)
    texts = [*TEXTS["caption_matching"], *["A dog."] * 22, *TEXTS["multi-choice"], *TEXTS["yes_no"]]  # as folders sort
    answers = answered(TEMPCOMPASS, samples, texts)
    scores = TEMPCOMPASS.score(answers)
    means, unmatched = [], []
    for task, own in TEXTS.items():
        ratings = [rating(task, t, r["question"], r["answer"]) for t, r in zip(own, rows(task), strict=True)]
        assert {*ratings} == {0, 1, None}
        hits = [float(one or 0) for one in ratings]
        means.append(fmean(hits))
        unmatched += [float(one is None) for one in ratings]
        assert scores[f"accuracy/task/{task}"].value == pytest.approx(fmean(hits))
        assert scores[f"accuracy/{task}/speed"].value == pytest.approx(fmean(hits[:11]))
        assert scores[f"accuracy/{task}/order"].value == pytest.approx(fmean(hits[11:]))
    assert scores["accuracy"].value == pytest.approx(fmean(means))
    assert scores["no_letter"].value == pytest.approx(fmean(unmatched))
    assert not any("captioning" in name for name in scores)


def test_predictions(root: Path) -> None:
    samples, _ = read(TEMPCOMPASS, root)
    answers = answered(TEMPCOMPASS, samples, [str(i) for i in range(88)])
    files = {name: json.loads(content) for name, content in TEMPCOMPASS.submission(answers).items()}
    assert {*files} == {"multi-choice.json", "yes_no.json", "caption_matching.json", "captioning.json"}
    captions = files["captioning.json"]
    assert {video: {dim: len(own) for dim, own in dims.items()} for video, dims in captions.items()} == {
        "10_reverse": {"speed": 6, "order": 5}, "10": {"speed": 5, "order": 6}
    }  # fmt: skip
    assert captions["10"]["speed"][0] == {"question": INFORMATION, "answer": "B. dog", "prediction": "23"}
    assert files["multi-choice.json"]["10"]["speed"][0]["answer"] == "B. walking"
    only = [one for one, sample in zip(answers, samples, strict=True) if sample.fields["task"] == "captioning"]
    assert TEMPCOMPASS.score(only) == {}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("yes_no", {"answer": "maybe"}, "answer: 'maybe' is none of the options yes, no"),
        ("multi-choice", {"answer": "E. flying"}, "answer: 'E. flying' is none of the options A, B, C, D"),
        ("multi-choice", {"question": "What?"}, "answer: 'A' is none of the options"),
        (
            "caption_matching",
            {"answer": "Sentence C: It"},
            "answer: 'Sentence C' is none of the options Sentence A, Sen",
        ),
        ("captioning", {"dim": None}, "dim: null; it must be a text"),
        ("captioning", {"video_id": 10}, "video_id: 10 is of type int"),
        ("other", {}, "folder: 'other' is none of the options multi-choice, yes_no"),
    ],
)
def test_bad_records(tmp_path: Path, task: str, change: dict[str, Any], message: str) -> None:
    write_parquet(tmp_path / f"TempCompass/{task}/test-00000-of-00001.parquet", [{**rows(task)[0], **change}])
    samples, bad = read(TEMPCOMPASS, tmp_path)
    assert not samples and bad[0].startswith(f"TempCompass/{task}/test-00000-of-00001.parquet:1: ")
    assert re.search(message, bad[0])
