"""MLVU in its published layout, and lmms-eval's rule for letters beside another writing of it."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, read, write_json
from vft import benchmarks

MLVU = benchmarks.find("mlvu")
TASKS = {"1_plotQA": "plotQA", "2_needle": "needle", "6_anomaly_reco": "anomaly_reco"}
TEXTS = [
    "A", "B", "C) Green", "(D)", "(B) Red", "b", "B. Red", "Red", "The answer is B.", "The answer is (C) up", "Best: D",
    "", "A man wears B", "I choose C because D is red", "the correct option is A, not B", "(A) or (B)", "(B) or (A)",
    "A. one B. two", "not sure", "D: it", "It is C", "My answer is Dog", "The choice is obvious: (A)", "Cat", "BAD CAB",
    "'C'", "A\nB", "选B", "答案是 D", "정답은 C", "Option C or D here", "E", "(E)", "A,B,C", "C?", "None of A) B) C)",
    "The answer is red. Answer is B", "  D  ", "Dog and Cat",
]  # fmt: skip
PHRASES = [
    f"{the}{kind} is"
    for kind in ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
    for the in ("", "the ")
] + ["i choose", "i select", "i pick", "my answer is", "my choice is"]
PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


def letter(text: str) -> str | None:
    """The first form that any letter has, best form first; of several letters the one that stands last."""
    bare = text.strip()
    for mark in [",", ".", "!", "?", ";", ":", "'", '"']:
        bare = re.sub(rf"\A{re.escape(mark)}*|{re.escape(mark)}*\Z", "", bare)
    padded = f" {bare} "
    if opening := re.match(r"\s*([A-D])(?![^\W\d_])", bare):
        return opening[1]
    if ending := re.search(r"(?<![^\W\d_])([A-D])\s*\Z", bare):
        return ending[1]
    behind = [padded[i + len(p) :].find(c) + i + len(p) for p in PHRASES for c in "ABCD"
              if (i := padded.lower().find(p)) >= 0 and c in padded[i + len(p) :]]  # fmt: skip
    if behind:
        return padded[max(behind)]
    for before, after in (("(", ")"), ("", "."), ("", ":"), ("", ")"), ("", " "), ("", "")):
        places = [m.start(1) for m in re.finditer(rf"{re.escape(before)}([A-D]){re.escape(after)}", padded)]
        if places:
            return padded[max(places)]
    return None


@pytest.mark.parametrize("text", TEXTS)
def test_letters(text: str) -> None:
    assert MLVU.letter_of(text, 4) == letter(text)


def row(i: int, **change: Any) -> dict[str, Any]:
    return {"video": f"v_{i}.mp4", "duration": 246, "question": f"What {i}?", "candidates": ["up", "down", "2", "left"],
            "answer": ["up", "down", "2", "left"][i % 4], "question_type": "findNeedle", **change}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One question has equal options, the right one twice; one has four empty ones; one none that is right."""
    folder = tmp_path / "MLVU" / "MLVU"
    odd = [
        row(0, candidates=["a", "b", "a", "c"], answer="a"),
        row(1, candidates=[""] * 4, answer=""),
        row(2, answer="x"),
    ]
    for task in TASKS:
        write_json(folder / "json" / f"{task}.json", odd + [row(i) for i in range(3, 13)])
        (folder / "video" / task).mkdir(parents=True)
        for i in range(13):
            (folder / "video" / task / f"v_{i}.mp4").write_bytes(b"")
    summary = {"video": "217.mp4", "duration": 480.0, "question": "Please summarize", "answer": "x"}
    write_json(folder / "json" / "9_summary.json", [summary])
    write_json(folder / "json" / "8_sub_scene.json", [{**summary, "scoring_points": ["x"]}])
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(MLVU, root)
    assert not bad and len(samples) == 39
    video, text = samples[3].turns[0].parts
    assert text == (
        "Question: What 3?\nOptions:\n(A) up\n(B) down\n(C) 2\n(D) left\nOnly give the best option.\nBest option: ("
    )
    assert video.path == root / "MLVU/MLVU/video/1_plotQA/v_3.mp4"
    assert [one.turns[1].text for one in samples[:4]] == ["C", "D", "(@) x", "D"]
    assert samples[1].turns[0].text.endswith("(C) \n(D)\nOnly give the best option.\nBest option: (")
    assert {one.fields["groups"]["task"] for one in samples} == {*TASKS.values()}


def test_scores(root: Path) -> None:
    samples, _ = read(MLVU, root)
    right = ["C", "D", "@", *("ABCD"[i % 4] for i in range(3, 13))] * 3
    hits = [float(letter(text) == one) for text, one in zip(TEXTS, right, strict=True)]
    scores = MLVU.score(answered(MLVU, samples, TEXTS))
    assert sum(hits) > 4 and scores["accuracy"].value == pytest.approx(fmean(hits))  # tasks of equal size
    for i, task in enumerate(TASKS.values()):
        assert scores[f"accuracy/task/{task}"].value == pytest.approx(fmean(hits[13 * i : 13 * i + 13]))
    assert scores["likelihood_accuracy"].value == pytest.approx(right.count("A") / 39)


def test_the_mean_is_over_tasks(root: Path) -> None:
    write_json(root / "MLVU/MLVU/json/2_needle.json", [row(0)])
    samples, _ = read(MLVU, root)
    scores = MLVU.score(answered(MLVU, samples, ["A"] * len(samples)))
    assert scores["accuracy"].value == pytest.approx((3 / 13 + 1 + 3 / 13) / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 2}, "answer: 2 is of type int"),
        ({"candidates": None}, "candidates: None must be a list of at least 2 texts"),
        ({"candidates": ["1", 2]}, r"candidates\[1\]: 2 is of type int"),
        ({"video": None}, "video: null; it must be a text"),
        ({"question": 5}, "question: 5 is of type int"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    write_json(root / "MLVU/MLVU/json/1_plotQA.json", [row(3), row(3, **change)])
    samples, bad = read(MLVU, root, path="MLVU/MLVU/json/1_plotQA.json")
    assert len(samples) == 1 and len(bad) == 1 and bad[0].startswith("MLVU/MLVU/json/1_plotQA.json:")
    assert re.search(message, bad[0])
