"""LongVideoBench in its published layouts, JSON and Parquet, and its rule beside another writing of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, read, write_json, write_parquet
from vft import benchmarks

BENCHMARK = benchmarks.find("longvideobench")
TEXTS = [
    "A", "B.", "(C)", "D. up", "The answer is D", "Best option: (C)", "Best answer: down", "Best option:A", "up", "",
    "The best option is B, not A", "down", "E", "Down", "Because it is Dark", "b", "I think it is D", "F", "Option C",
    "The correct answer is: Down", "answer: B", "A man", "The Answer is B", "Best", "The best answer is C.", "C\nD",
    "d) A", "it is hard to say what the person who opens the door says first", "42", "It shows A, B and C, so D",
    "Beside Best option: D",
]  # fmt: skip
PHRASES = ["The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
           "The correct option is", "Best answer:", "Best option:"]  # fmt: skip


def letter(text: str) -> str | None:
    for phrase in PHRASES:
        text = "".join(text.split(phrase))
    return next((character for character in text if character in {"A", "B", "C", "D", "E"}), None)


def row(i: int, **change: Any) -> dict[str, Any]:
    return {
        "video_id": f"v{i}", "question": f"When {i}?", "question_wo_referring_query": "When?", "id": f"v{i}_0",
        "candidates": ["up", "down", "left", "right", "over"][: 2 + i % 4], "correct_choice": i % 2, "position": [12],
        "topic_category": "MR-Movie-Recaps", "question_category": ["S2E", "TOS"][i % 2], "level": "L1-Perception",
        "video_path": f"v{i}.mp4", "subtitle_path": f"v{i}_en.json", "duration_group": [15, 60, 600, 3600][i % 4],
        "starting_timestamp_for_subtitles": 0, "duration": 8.5, "view_count": 12,
    } | change  # fmt: skip


def in_columns(one: dict[str, Any]) -> dict[str, Any]:
    """As the Parquet files have it."""
    options = one.pop("candidates")
    return one | {f"option{i}": [*options, *["N/A"] * 5][i] for i in range(5)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "LongVideoBench"
    rows = [row(i) for i in range(len(TEXTS))]
    write_json(folder / "lvb_val.json", rows)
    write_json(
        folder / "lvb_test_wo_gt.json", [{k: v for k, v in one.items() if k != "correct_choice"} for one in rows]
    )
    write_parquet(folder / "validation-00000-of-00001.parquet", [in_columns(row(i)) for i in range(len(TEXTS))])
    (folder / "videos").mkdir()
    for one in rows:
        (folder / "videos" / one["video_path"]).write_bytes(b"")
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(BENCHMARK, root)
    assert not bad and len(samples) == len(TEXTS)
    video, text = samples[1].turns[0].parts
    assert text == (
        "When 1?\nA. up\nB. down\nC. left\nAnswer with the option's letter from the given choices directly.\n"
    )
    assert video.path == root / "LongVideoBench/videos/v1.mp4" and samples[1].turns[1].text == "B"
    assert samples[1].fields["groups"] == {"duration_group": "60", "question_category": "TOS"}
    columns, bad = read(BENCHMARK, root, path="LongVideoBench/validation-*.parquet")
    assert not bad and [one.turns for one in columns] == [one.turns for one in samples]
    assert [one.fields["options"] for one in columns] == [one.fields["options"] for one in samples]


def test_scores(root: Path) -> None:
    samples, _ = read(BENCHMARK, root)
    answers = answered(BENCHMARK, samples, TEXTS)
    found = [letter(text) for text in TEXTS]
    assert [BENCHMARK.letter(one) for one in answers] == found and len({*found}) == 6 and len(TEXTS) >= 30
    hits = [float(one == "AB"[i % 2]) for i, one in enumerate(found)]
    scores = BENCHMARK.score(answers)
    assert scores["accuracy"].value == pytest.approx(fmean(hits)) and sum(hits) > 3
    assert scores["accuracy/duration_group/3600"].value == pytest.approx(fmean(hits[3::4]))
    assert scores["accuracy/question_category/TOS"].value == pytest.approx(fmean(hits[1::2]))
    assert scores["no_letter"].value == pytest.approx(found.count(None) / len(found))
    assert BENCHMARK.submission(answers) == {}


def test_withheld_answers(root: Path) -> None:
    samples, bad = read(BENCHMARK, root, path="LongVideoBench/lvb_test_wo_gt.json")
    answers = answered(BENCHMARK, samples, TEXTS)
    assert not bad and BENCHMARK.score(answers) == {}
    (content,) = BENCHMARK.submission(answers).values()
    assert json.loads(content) == {f"v{i}_0": text for i, text in enumerate(TEXTS)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct_choice": 2}, "correct_choice: 2 is none of the options 0 to 1"),
        ({"correct_choice": "A"}, "correct_choice: 'A' is none of the options"),
        ({"correct_choice": 1.0}, "correct_choice: 1.0 is none of the options"),
        ({"candidates": ["up"]}, "candidates: .* must be a list of at least 2 texts"),
        ({"candidates": [3, 4]}, r"candidates\[0\]: 3 is of type int"),
        ({"video_path": None}, "video_path: null; it must be a text"),
        ({"id": 7}, "id: 7 is of type int"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    write_json(root / "LongVideoBench/lvb_val.json", [row(0), row(4, **change)])
    samples, bad = read(BENCHMARK, root)
    assert len(samples) == 1 and len(bad) == 1 and bad[0].startswith("LongVideoBench/lvb_val.json:1:")
    assert re.search(message, bad[0])
