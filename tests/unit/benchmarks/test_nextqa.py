"""NExT-QA's multiple choice in its published layout, and MMMU's rule for letters beside another writing of it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, asked, read, write_empty, write_parquet
from vft import benchmarks
from vft.metrics.mmmu import mmmu_letter

NEXTQA = benchmarks.find("nextqa")
OPTIONS = ["on the sofa", "in the Car", "to play", "A", "dog runs"]
TEXTS = [
    "A", "B", "(C)", "(B) or (A)", "The answer is D.", "C. to play", "B: in the car", "A. x B. y", "E ", "e", "",
    "the boy is sitting down in the car", "sofa", "on the sofa", "it is on the sofa and then to play there", "BA ",
    "A person plays and B too", "Answer: C", "\n(D)\n", "...E...", "A) red", "C.", "(A) is wrong, (C) is right", "D:",
    "I think that this is the dog runs one", "'B'", "B,", "None of these options fits what is seen here", "A.B.C.",
    "A: no. C: yes. B is not", "E. E. D.", "(F)", "a. b. c.", "Both A and B are true but C ", "dog runs", "X: B:",
    "AB C D",
    "Option B.", "no idea at all, sorry my dear friend", "The correct one is E",
]  # fmt: skip


def letter(answer: str, options: list[str]) -> str | None:
    """By the rule: candidates of each style, then the one that is written last."""
    for mark in [",", ".", "!", "?", ";", ":", "'"]:
        answer = answer.strip(mark)
    answer = " " + answer + " "
    names = "ABCDEFGHIJ"[: len(options)]
    dotted = [name for name in names if name + "." in answer]
    bracketed = [name for name in names if "(" + name + ")" in answer]
    spaced = [name for name in names if name + " " in answer]
    written = [name for name, text in zip(names, options, strict=True) if text.lower() in answer.lower()]
    written = written if len(answer.split()) > 5 else []
    found = bracketed or spaced or dotted
    style = "({})" if bracketed else " {} "
    if found:
        ends = [answer.rfind(style.replace("{}", name)) for name in found]
    else:
        found, ends = written, [answer.lower().rfind(options[names.index(name)].lower()) for name in written]
    return found[ends.index(max(ends))] if found else None


def row(i: int, **changes: Any) -> dict[str, Any]:
    kinds = ["CW", "CH", "TN", "TP", "TC", "DC", "DL", "DO"]
    texts = {f"a{k}": OPTIONS[k] + " " * (k == 2) for k in range(5)}
    about = {
        "video": 4010069381 + i % 3,
        "frame_count": 369,
        "width": 640,
        "height": 480,
        "qid": i,
        "type": kinds[i % 8],
    }
    return {**about, "question": f" how do they play {i} ", "answer": i % 5, **texts, **changes}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "NExTQA"
    write_parquet(folder / "MC" / "test-00000-of-00001.parquet", [row(i) for i in range(len(TEXTS))])
    write_empty(folder / "NExTVideo" / "4010069381.mp4", folder / "NExTVideo" / "4010069382.MP4")
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(NEXTQA, root)
    assert not bad and len(samples) == len(TEXTS)
    video, text = samples[0].turns[0].parts
    assert text == "how do they play 0\nA. on the sofa\nB. in the Car\nC. to play\nD. A\nE. dog runs"
    assert video.path.name == "4010069381.mp4" and samples[1].turns[0].parts[0].path.name == "4010069382.MP4"
    assert samples[2].turns[0].parts[0].path == (root / "NExTQA" / "NExTVideo" / "4010069383.mp4").resolve()  # missing
    assert samples[3].turns[1].text == "D" and samples[3].id == "4010069381-3"
    assert samples[3].fields["groups"] == {"kind": "TN", "type": "T"}


def test_the_authors_table(root: Path) -> None:
    rows = [row(i) for i in range(4)]
    with (root / "NExTQA" / "test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    samples, bad = read(NEXTQA, root, path="NExTQA/test.csv")
    assert not bad and samples[2].turns[0].text == read(NEXTQA, root)[0][2].turns[0].text
    assert [one.turns[1].text for one in samples] == ["A", "B", "C", "D"]


def test_scores(root: Path) -> None:
    samples, _ = read(NEXTQA, root)
    scores = NEXTQA.score(answered(NEXTQA, samples, TEXTS))
    texts = [text.strip() for text in OPTIONS]
    right = [float(letter(t, texts) == one.references[0]) for t, one in zip(TEXTS, asked(NEXTQA, samples), strict=True)]
    assert scores["accuracy"].value == pytest.approx(sum(right) / len(right)) and sum(right) > 3
    for kind in "CTD":
        own = [r for r, one in zip(right, samples, strict=True) if one.fields["groups"]["type"] == kind]
        assert scores[f"accuracy/type/{kind}"].value == pytest.approx(sum(own) / len(own))
    assert "accuracy/kind/TP" not in scores and "likelihood_accuracy/kind/TN" in scores


@pytest.mark.parametrize("text", TEXTS)
def test_letters(text: str) -> None:
    for options in (OPTIONS, OPTIONS[:2], ["5", "7", "on the sofa", "dog", "x"]):
        assert mmmu_letter(text, options) == letter(text, options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 5}, "answer: 5 is none of the options 0 to 4"),
        ({"answer": "on the sofa"}, "answer: 'on the sofa' is none of the options 0 to 4"),
        ({"type": "X"}, "type: 'X' is none of TP, CW"),
        ({"type": None}, "type: null; it must be a text"),
        ({"a3": None}, "a3: null; it must be a text"),
        ({"a3": " "}, "a3: is empty"),
        ({"video": None}, "video: null; it must be a text"),
        ({"question": None}, "question: null; it must be a text"),
        ({"qid": 1.5}, "qid: 1.5 is of type float"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    for number, one in enumerate((row(0), row(1, **change))):
        write_parquet(root / "NExTQA" / "MC" / f"test-{number:05}-of-00002.parquet", [one])
    (root / "NExTQA" / "MC" / "test-00000-of-00001.parquet").unlink()
    samples, bad = read(NEXTQA, root)
    assert len(samples) == 1 and len(bad) == 1
    assert bad[0].startswith(f"NExTQA/MC/test-00001-of-00002.parquet:1: {message}")
