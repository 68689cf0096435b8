"""Perception Test in the layout of both splits, its rule for letters beside another writing, and what is uploaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, asked, read, write_empty, write_parquet
from vft import benchmarks

PERCEPTION = benchmarks.find("perceptiontest")
OPTIONS = ["moving left", "moving right", "static"]
TEXTS = [
    "A", "B.", "(C)", "c", "D", "E", "", "moving left", "The answer is B", "A. moving left", "B: C", "AB", "A_B",
    "BC A", "Because B", "A/C", "it's C!", "\nB\n", "Option_A", "x.C", "A1", "1A", "C-", "-B-", "ABCD D", "a. A",
    "Á B", "éC",
    "I", "Dog", "Camera B", "No A", "**B**", "option (d)", "C and D", "A man: C",
]  # fmt: skip


def letter(text: str) -> str | None:
    """The first of A to D with no letter, digit or underscore on either side."""
    padded = f" {text.strip()} "
    for before, one, behind in zip(padded, padded[1:], padded[2:], strict=False):
        if one in "ABCD" and not any(c.isalnum() or c == "_" for c in (before, behind)):
            return one
    return None


def row(i: int, **changes: Any) -> dict[str, Any]:
    areas, kinds = ["physics", "memory", "semantics", "abstraction"], ["descriptive", "explanatory", "predictive"]
    about = {"video_name": f"video_{i // 2}", "question": f"Is the camera moving {i}?", "question_id": str(i % 2)}
    groups = {"area": areas[i % 4], "reasoning": kinds[i % 3], "tag": ["motion"] * (i % 2)}
    return {**about, "options": OPTIONS, "answer_id": str(i % 3), **groups, **changes}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "PerceptionTest_Val"
    write_parquet(folder / "mc_question_val" / "validation-00000-of-00001.parquet", [row(i) for i in range(len(TEXTS))])
    write_empty(folder / "videos" / "video_0.mp4", folder / "videos" / "video_1.MP4")
    shown = ("video_name", "question", "question_id", "options")
    test = [{key: row(i)[key] for key in shown} for i in range(3)]
    write_parquet(tmp_path / "PerceptionTest" / "mc_question" / "test-00000-of-00001.parquet", test)
    write_empty(tmp_path / "PerceptionTest" / "videos" / "video_0.mp4")
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(PERCEPTION, root)
    assert not bad and len(samples) == len(TEXTS)
    video, text = samples[0].turns[0].parts
    assert text == (
        "Is the camera moving 0?\nA. moving left\nB. moving right\nC. static\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert video.path.name == "video_0.mp4" and samples[2].turns[0].parts[0].path.name == "video_1.MP4"
    assert samples[4].turns[0].parts[0].path.name == "video_2.mp4"  # missing
    assert samples[2].turns[1].text == "C"
    assert samples[2].fields["groups"] == {"area": "semantics", "reasoning": "predictive"}


def test_scores(root: Path) -> None:
    samples, _ = read(PERCEPTION, root)
    scores = PERCEPTION.score(answered(PERCEPTION, samples, TEXTS))
    right = [float(letter(t) == one.references[0]) for t, one in zip(TEXTS, asked(PERCEPTION, samples), strict=True)]
    assert scores["accuracy"].value == pytest.approx(sum(right) / len(right)) and sum(right) > 5
    for key, value in (("area", "physics"), ("reasoning", "explanatory")):
        own = [r for r, one in zip(right, samples, strict=True) if one.fields["groups"][key] == value]
        assert scores[f"accuracy/{key}/{value}"].value == pytest.approx(sum(own) / len(own))
    assert PERCEPTION.submission(answered(PERCEPTION, samples, TEXTS)) == {}


def test_submission(root: Path) -> None:
    samples, bad = read(PERCEPTION, root, path="PerceptionTest/mc_question")
    assert not bad and len(samples) == 3
    assert samples[0].turns[0].parts[0].path == (root / "PerceptionTest" / "videos" / "video_0.mp4").resolve()
    answers = answered(PERCEPTION, samples, ["B", "no idea", "D"])
    answers[1] = replace(answers[1], option_scores=(-3.0, -2.0, -1.0))
    assert PERCEPTION.score(answers) == {}
    assert json.loads(PERCEPTION.submission(answers)["perceptiontest.json"]) == {
        "video_0": [
            {"id": 0, "answer_id": 1, "answer": "moving right"},
            {"id": 1, "answer_id": 2, "answer": "static"},
        ],
        "video_1": [{"id": 0, "answer_id": 0, "answer": "moving left"}],
    }


@pytest.mark.parametrize("text", TEXTS)
def test_letters(text: str) -> None:
    assert PERCEPTION.letter_of(text, 3) == letter(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_id": "3"}, "answer_id: '3' is none of the options 0 to 2"),
        ({"options": ["one"]}, "options: ['one'] must be a list of at least 2 texts"),
        ({"options": None}, "options: None must be a list"),
        ({"video_name": None}, "video_name: null; it must be a text"),
        ({"question_id": ""}, "question_id: is empty"),
        ({"question": None}, "question: null; it must be a text"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    name = "mc_question_val/validation-00000-of-00001.parquet"
    write_parquet(root / "PerceptionTest_Val" / name, [row(0), row(1, **change)])
    samples, bad = read(PERCEPTION, root)
    assert len(samples) == 1 and len(bad) == 1 and bad[0].startswith(f"PerceptionTest_Val/{name}:2: {message}")
