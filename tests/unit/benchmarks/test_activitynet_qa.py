"""ActivityNet-QA as lmms-eval's data set has it: exact match by type, and the file that a judge reads."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, read, write_empty, write_parquet
from vft import benchmarks

ACTIVITYNET_QA = benchmarks.find("activitynet_qa")
RIGHT = ["dance", "behind", "jump", "yes", "Red", "long hair", "gym", "2", "happy"]
TEXTS = [
    "dance", "Dance.", "dancing", "DANCE", "behind", "in front", "Behind the man", "jump", "Jump!", "", "yes", "Yes",
    "Yes.", "Yes, he is.", "no", "red", "RED", "Red.", "dark red", "long hair", "Long hair.", "hair, long", "gym",
    "In a gym", "GYM", "2", "two", "2.", "happy", "Happy", "very happy", "'happy'", "  happy ", "sad", "yes\n",
    "dance?",
]  # fmt: skip
NAMES = {0: "motion", 1: "spatial", 2: "temporal", 3: "yes_no", 4: "color", 5: "object", 6: "location", 7: "number",
         8: "other"}  # fmt: skip
KINDS = [(3 * i + i // 9) % 9 for i in range(36)]


def rows() -> list[dict[str, Any]]:
    return [
        {"video_name": f"1QIUV7WYK{i % 5}", "question_id": f"v_1QIUV7WYK{i % 5}_{i}", "type": str(kind),
         "question": "is the athlete on TV wearing trousers", "answer": RIGHT[kind]} for i, kind in enumerate(KINDS)
    ]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "ActivityNetQA" / "data" / "test-00000-of-00001.parquet", rows())
    folder = tmp_path / "ActivityNetQA" / "all_test"
    write_empty(*(folder / f"v_1QIUV7WYK{i}.{suffix}" for i, suffix in enumerate(["mp4", "webm", "mkv", "mp4"])))
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(ACTIVITYNET_QA, root)
    assert not bad and len(samples) == 36
    video, text = samples[1].turns[0].parts
    assert text == "Is the athlete on tv wearing trousers? Answer the question using a single word or phrase."
    assert video.path.parts[-2:] == ("all_test", "v_1QIUV7WYK1.webm")
    assert not samples[4].turns[0].parts[0].path.exists()  # counted as unreadable


def test_scores(root: Path) -> None:
    """Right is the same text, but for case, marks and space around it."""
    samples, _ = read(ACTIVITYNET_QA, root)
    scores = ACTIVITYNET_QA.score(answered(ACTIVITYNET_QA, samples, TEXTS))

    def plain(text: str) -> str:
        return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()

    right = [float(plain(text) == plain(RIGHT[kind])) for text, kind in zip(TEXTS, KINDS, strict=True)]
    assert 3 < sum(right) < 33
    assert scores["exact_match"].value == pytest.approx(sum(right) / 36)
    for kind, name in NAMES.items():
        own = [score for score, one in zip(right, KINDS, strict=True) if one == kind]
        key = f"exact_match/{'question' if kind < 3 else 'answer'}/{name}"
        assert scores[key].value == pytest.approx(sum(own) / len(own))
    free = [score for score, one in zip(right, KINDS, strict=True) if one >= 3]
    assert scores["exact_match/question/free"].value == pytest.approx(sum(free) / len(free))


def test_file_for_a_judge(root: Path) -> None:
    samples, _ = read(ACTIVITYNET_QA, root)
    files = ACTIVITYNET_QA.submission(answered(ACTIVITYNET_QA, samples, TEXTS))
    wanted = [
        {"video_name": row["video_name"], "Q": row["question"], "A": row["answer"], "pred": text,
         "question_id": row["question_id"], "type": row["type"]} for row, text in zip(rows(), TEXTS, strict=True)
    ]  # fmt: skip
    assert json.loads(files["activitynet_qa.json"]) == wanted and len(files) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "9"}, "type: '9' is none of the types 0 to 8"),
        ({"type": None}, "type: null; it must be a text"),
        ({"question": None}, "question: null; it must be a text"),
        ({"answer": ""}, "answer: is empty"),
        ({"video_name": None}, "video_name: null; it must be a text"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    first, *others = rows()
    write_parquet(root / "ActivityNetQA" / "data" / "test-00000-of-00001.parquet", [{**first, **change}, *others])
    samples, bad = read(ACTIVITYNET_QA, root)
    assert len(samples) == 35 and len(bad) == 1
    assert bad[0].startswith("ActivityNetQA/data/test-00000-of-00001.parquet:1:") and message in bad[0]
