"""EgoSchema in the layout of its Parquet files, the file for its server, and its rule beside another writing of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, read, write_parquet
from vft import benchmarks

EGOSCHEMA = benchmarks.find("egoschema")
OPTIONS = ["A. C cooks a meal.", "B. C cleans it.", "C. c Sews.", "D. C reads USA today", "E. nothing"]
TEXTS = [
    "A", "B", "(C)", "(c)", "D.", "E. nothing", "The answer is B.", "The answer is (D), not (A).", "A or B", "B, A",
    "c. c sews.", "I would say that it is c. c sews.", "it seems to be b. c cleans it and c. c sews. too", "", "no",
    "B. C cleans it.", "'A'", "A!", "A:", "Option E", "Option E is it, A is not", "USA", "in the USA today", "D?",
    "(B) (B) C.", "B A B", "A,B", "Answer: E", "a", "Because of C", "  E  ", "A\nbecause",
    "e. nothing is what is done here",
]  # fmt: skip


def index(text: str) -> int | None:
    """As the public rule: which of the marks of a letter has its last place before those of all others."""
    for mark in [",", ".", "!", "?", ";", ":", "'"]:
        text = re.sub(f"^{re.escape(mark)}+|{re.escape(mark)}+$", "", text)
    text = " " + text + " "
    marks = [(last(text, shape % name), i) for shape in ("(%s)", "%s ", "%s.") for i, name in enumerate("ABCDE")]
    named = [one for one in marks if one[0] >= 0]
    if not named and len(text.split()) > 5:
        named = [(at, i) for i, option in enumerate(OPTIONS) if (at := last(text.lower(), option.lower())) >= 0]
    return min(named)[1] if named else None


def last(text: str, part: str) -> int:
    return max((i for i in range(len(text)) if text[i:].startswith(part)), default=-1)


def rows(answers: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "question_idx": str(i),
            "question": "What does c do?",
            "video_idx": f"{i:04}-uid",
            "option": OPTIONS,
            "answer": a,
        }
        for i, a in enumerate(answers)
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_parquet(
        tmp_path / "EgoSchema/Subset/test-00000-of-00001.parquet", rows([str(i % 5) for i in range(len(TEXTS))])
    )
    write_parquet(tmp_path / "EgoSchema/GENERATION/test-00000-of-00001.parquet", rows([None] * len(TEXTS)))
    (tmp_path / "EgoSchema/videos").mkdir()
    for i in range(len(TEXTS)):
        (tmp_path / f"EgoSchema/videos/{i:04}-uid.{'MP4' if i == 1 else 'mp4'}").write_bytes(b"")
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(EGOSCHEMA, root)
    assert not bad and len(samples) == len(TEXTS)
    video, text = samples[1].turns[0].parts
    assert text == (
        "What does c do?\nA. C cooks a meal.\nB. C cleans it.\nC. c Sews.\nD. C reads USA today\nE. nothing\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert video.path == root / "EgoSchema/videos/0001-uid.MP4"
    assert samples[1].turns[1].text == "B" and samples[1].fields["options"] == tuple("ABCDE")


def test_scores(root: Path) -> None:
    samples, _ = read(EGOSCHEMA, root)
    answers = answered(EGOSCHEMA, samples, TEXTS)
    expected = [index(text) for text in TEXTS]
    assert len({*expected}) == 6 and len(TEXTS) >= 30
    assert [EGOSCHEMA.letter(one) for one in answers] == [None if i is None else "ABCDE"[i] for i in expected]
    scores = EGOSCHEMA.score(answers)
    right = [found == i % 5 for i, found in enumerate(expected)]
    assert scores["accuracy"].value == pytest.approx(sum(right) / len(right)) and sum(right) > 4
    assert scores["no_letter"].value == pytest.approx(expected.count(None) / len(TEXTS))
    assert EGOSCHEMA.submission(answers) == {}


def test_withheld_answers_are_written_for_the_server(root: Path) -> None:
    samples, bad = read(EGOSCHEMA, root, path="EgoSchema/GENERATION")
    answers = answered(EGOSCHEMA, samples, TEXTS)
    assert not bad and EGOSCHEMA.score(answers) == {}
    sent = json.loads(EGOSCHEMA.submission(answers)["egoschema.json"])
    assert sent == {f"{i:04}-uid": index(text) or 0 for i, text in enumerate(TEXTS)}  # the first option is likeliest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "5"}, "answer: '5' is none of the options 0 to 4"),
        ({"answer": "B"}, "answer: 'B' is none of the options"),
        ({"option": ["A. one"]}, "option: .* must be a list of at least 2 texts"),
        ({"option": None}, "option: None must be"),
        ({"question": None}, "question: null; it must be a text"),
        ({"video_idx": "../../../x"}, "out of data.root"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    row = rows(["3"])[0]
    write_parquet(root / "EgoSchema/Subset/test-00000-of-00001.parquet", [row, {**row, **change}])
    samples, bad = read(EGOSCHEMA, root)
    assert len(samples) == 1 and len(bad) == 1 and bad[0].startswith("EgoSchema/Subset/test-00000-of-00001.parquet:2: ")
    assert re.search(message, bad[0])
