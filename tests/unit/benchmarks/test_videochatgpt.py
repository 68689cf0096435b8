"""VideoChatGPT's three parts, and the files that a judge reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import coco
from tests.helpers.benchmarks import answered, asked, read, write_empty, write_parquet
from vft import benchmarks

VIDEOCHATGPT = benchmarks.find("videochatgpt")
NAMES = [f"v_{i:04d}" for i in range(6)]


def part(name: str) -> list[dict[str, Any]]:
    """Twelve rows; of `Consistency` each video has two, of which one has the question, the other the text None."""
    common = [{"video_name": NAMES[i // 2], "answer": f"Answer {i}.", "question": f"{name} {i}?"} for i in range(12)]
    if name != "Consistency":
        return common
    return [
        {"video_name": row["video_name"], "answer": "Both.", "question_1": "None" if i % 2 else row["question"],
         "question_2": row["question"] if i % 2 else "None", "question": "None"} for i, row in enumerate(common)
    ]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("Consistency", "Generic", "Temporal"):
        write_parquet(tmp_path / "VideoChatGPT" / name / "test-00000-of-00001.parquet", part(name))
    write_empty(
        *(tmp_path / "VideoChatGPT" / "Test_Videos" / f"{n}.{'mkv' if n == NAMES[1] else 'mp4'}" for n in NAMES)
    )
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(VIDEOCHATGPT, root)
    assert not bad and len(samples) == 36 and len({one.id for one in samples}) == 36
    assert [one.turns[0].parts[1] for one in samples] == [
        f"{name} {i}?" for name in ("Consistency", "Generic", "Temporal") for i in range(12)
    ]
    assert all(one.turns[0].parts[0].path.exists() for one in samples)
    alone, _ = read(VIDEOCHATGPT, root, path="VideoChatGPT/Temporal/test-*.parquet")
    assert [one.id for one in alone] == [f"temporal-{i}" for i in range(1, 13)]


def judged(root: Path, texts: list[str]) -> dict[str, list[dict[str, str]]]:
    """What lmms-eval hands its judge: an entry a row, and for consistency the first two rows of a video joined."""
    given = iter(texts)
    consistency, generic, temporal = (
        list(zip(part(name), [next(given) for _ in range(12)], strict=True))
        for name in ("Consistency", "Generic", "Temporal")
    )
    pairs: dict[str, dict[str, str]] = {}
    for row, text in consistency:
        number = 1 if row["question_1"] != "None" else 2
        entry = pairs.setdefault(row["video_name"], {"video_name": row["video_name"], "A": row["answer"]})
        entry |= {f"Q{number}": row[f"question_{number}"], f"pred{number}": text}
    plain = {
        name: [{"video_name": r["video_name"], "Q": r["question"], "A": r["answer"], "pred": text} for r, text in own]
        for name, own in (("generic", generic), ("temporal", temporal))
    }
    return {"consistency": list(pairs.values()), **plain}


def test_files_for_a_judge(root: Path) -> None:
    samples, _ = read(VIDEOCHATGPT, root)
    texts = coco.captions(36)
    answers = answered(VIDEOCHATGPT, samples, texts)
    assert VIDEOCHATGPT.score(answers) == {}
    files = {name: json.loads(content) for name, content in VIDEOCHATGPT.submission(answers).items()}
    assert files == {f"{name}.json": entries for name, entries in judged(root, texts).items()}
    # A question whose answer is missing takes its other half along; a part without answers has no file.
    few = VIDEOCHATGPT.submission(answers[1:13])
    assert few.keys() == {"consistency.json", "generic.json"} and len(json.loads(few["consistency.json"])) == 5


def test_several_pairs_about_one_video(root: Path) -> None:
    rows = part("Consistency")
    write_parquet(
        root / "VideoChatGPT" / "Consistency" / "test-00000-of-00001.parquet",
        [{**row, "video_name": NAMES[0]} for row in rows[:4]],
    )
    samples, _ = read(VIDEOCHATGPT, root, path="VideoChatGPT/Consistency")
    assert len(asked(VIDEOCHATGPT, samples)) == 4
    (content,) = VIDEOCHATGPT.submission(answered(VIDEOCHATGPT, samples, list("abcd"))).values()
    assert [(one["pred1"], one["pred2"]) for one in json.loads(content)] == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video_name": None}, "video_name: null; it must be a text"),
        ({"question": None}, "question: null; it must be a text"),
        ({"answer": None}, "answer: null; it must be a text"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    first, *others = part("Generic")
    write_parquet(root / "VideoChatGPT" / "Generic" / "test-00000-of-00001.parquet", [{**first, **change}, *others])
    samples, bad = read(VIDEOCHATGPT, root)
    assert len(samples) == 35 and len(bad) == 1
    assert bad[0].startswith("VideoChatGPT/Generic/test-00000-of-00001.parquet:1:") and message in bad[0]


def test_another_folder(root: Path) -> None:
    (root / "VideoChatGPT" / "Generic").rename(root / "VideoChatGPT" / "Other")
    samples, bad = read(VIDEOCHATGPT, root)
    assert len(samples) == 24 and len(bad) == 12
    assert "is in none of the folders Generic, Temporal, Consistency" in bad[0]
