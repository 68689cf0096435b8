"""Video-MMMU in its published layout, and the rules for open answers beside another writing of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.benchmarks import answered, asked, read, write_empty, write_parquet
from vft import benchmarks
from vft.metrics import lmms_letter
from vft.metrics.mmmu import mmmu_is_right

MMMU, ALONE = benchmarks.find("video_mmmu"), benchmarks.find("video_mmmu_question_only")
LETTERED = [
    "A. red",
    "B. blue",
    "C. green",
    "D. grey",
    "E. brown",
    "F. pink",
    "G. white",
    "H. cyan",
    "I. gold",
    "J. tan",
]
OPEN = ["24", "0.67", "1,200", "x", "tom", "-3.5", "1e3", "ionic bond"]
TEXTS = [
    "24", "The answer is 24.", "24.0", "It is 24 cm", "240", "Answer: 24", "so x = 24", "the result is 0.667", "0.6666",
    ".67", "2/3 = 0.67", "1200", "1,200 dollars", "$1200", "we have 1200.0", "x", "the variable is x", "x is it", "xy",
    "It is Tom", "tomorrow", "Tom.", "I think so Tom", "-3.5", "3.5", "equals -3.50", "1000", "1e3", "1E+3 units",
    "It has an ionic bond.", "an Ionic Bond", "bond", "", "Therefore it is 24\nNo, it is 25", "is\n24",
    "total 24 total 7", "first is 24.\nthen the answer is .", "answer :", "A", "B.", "(C)", "The answer is D",
    "is !\nx", "so 24 is",
]  # fmt: skip
ENDS_OF = (
    "could be |so |is |thus |therefore |final |answer |result |are |in total |total |identify |recognize |calculated "
    "as |counted as |measured as |observed as |concluded as |found to be |equals |determined to be |number of |value "
    "is |adds up to |have |has "
)


def values(text: str) -> set[float | str]:
    """A number to two decimals, or words; a single character is told apart by a space."""
    text = text.strip()
    try:
        return {round(float("".join(text.split(","))), 2)}
    except ValueError:
        return {text.lower()} if len(text) != 1 else {" " + text.lower(), text.lower() + " "}


def is_right(text: str, answer: str) -> bool:
    """By the rule: what stands behind the words that lead to an answer, and all numbers in it."""
    text = text.strip().strip(".").lower()
    lines, phrases = text.split("\n"), []
    for i, line in enumerate(lines):
        words = ENDS_OF.split("|") + (["="] if i == len(lines) - 1 else [])
        shortest = ""
        for end in (line.split(word)[-1].strip() for word in words if word in line):
            shortest = end if not shortest or len(end) < len(shortest) else shortest
        if shortest and shortest not in [":", ",", ".", "!", "?", ";", "'"]:
            phrases.append(shortest)
    phrases = phrases or [text]
    grouped = r"-?\b\d{1,3}(?:,\d{3})+\b"
    scientific = r"-?\d+(?:\.\d+)?[eE][+-]?\d+"
    plain = r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"
    numbers = [n for phrase in phrases for pattern in (grouped, scientific, plain) for n in re.findall(pattern, phrase)]
    said = set().union(*map(values, phrases + numbers))
    for one in values(answer):
        if isinstance(one, float) and one in said:
            return True
        if isinstance(one, str) and any(isinstance(other, str) and one in other for other in said):
            return True
    return False


def row(i: int, **changes: Any) -> dict[str, Any]:
    names = ["Art_Theory", "Finance", "Math", "Public_Health", "Sociology", "Computer_Science"]
    about = {"id": f"{['dev', 'validation'][i % 2]}_{names[i % 6]}_{i}", "question": f"What <image 1> {i}?"}
    options = ["red", "blue", "green"] if i % 2 else LETTERED
    return {**about, "options": options, "answer": "ABC"[i % 3], "question_type": "multiple-choice", **changes}


def open_row(i: int, **changes: Any) -> dict[str, Any]:
    return row(i, options=[], answer=OPEN[i % len(OPEN)], question_type="open", **changes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "VideoMMMU"
    for track in ("Perception", "Comprehension"):
        kind = "perception" if track == "Perception" else "multiple-choice"
        rows = [row(i, question_type=kind) for i in range(10)]
        write_parquet(folder / track / "test-00000-of-00001.parquet", rows)
    rows = [row(0), row(1), *[open_row(i) for i in range(2, 22)]]
    write_parquet(folder / "Adaptation" / "test-00000-of-00001.parquet", rows)
    write_empty(folder / "Art" / "dev_Art_Theory_0.mp4", folder / "Business" / "validation_Finance_1.mp4")
    write_empty(folder / "question_only" / "dev_Art_Theory_0_image.mp4", folder / "__MACOSX" / "._x.parquet")
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(MMMU, root)
    assert not bad and len(samples) == 42 and len({one.id for one in samples}) == 42
    by_id = {one.id: one for one in samples}
    for track in ("Perception", "Comprehension"):
        video, text = by_id[f"{track}-validation_Finance_1"].turns[0].parts
        assert text == (
            "What <image 1> 1?\nA. red\nB. blue\nC. green\nPlease ignore the Quiz question in last frame of the video."
        )
        assert video.path.parts[-2:] == ("Business", "validation_Finance_1.mp4")
    video, text = by_id["Adaptation-dev_Art_Theory_0"].turns[0].parts
    assert video.path.parts[-2:] == ("Art", "dev_Art_Theory_0.mp4")
    lead = "You should watch and learn the video content. Then apply what you learned to answer the following"
    picture = "The image for this question is at the end of the video."
    assert text == f"{lead} multi-choice question. {picture}\nWhat <image 1> 0?\n" + "\n".join(LETTERED)
    asked_open = by_id["Adaptation-dev_Math_2"]
    assert asked_open.turns[0].text == f"{lead} open-ended question. {picture}\nWhat <image 1> 2?"
    assert asked_open.turns[1].text == "1,200" and "options" not in asked_open.fields
    assert asked_open.fields["groups"] == {"discipline": "Science", "track": "Adaptation"}
    assert by_id["Perception-dev_Sociology_4"].fields["groups"]["discipline"] == "Humanities"


def test_the_picture_alone(root: Path) -> None:
    samples, bad = read(ALONE, root)
    assert not bad and len(samples) == 22
    video, text = samples[0].turns[0].parts
    assert video.path == (root / "VideoMMMU" / "question_only" / "dev_Art_Theory_0_image.mp4").resolve()
    assert text == "What <image 1> 0?\n" + "\n".join(LETTERED) and samples[2].turns[0].text == "What <image 1> 2?\n"


def test_scores(root: Path) -> None:
    samples, _ = read(MMMU, root)
    texts = TEXTS[2:]
    scores = MMMU.score(answered(MMMU, samples, texts))
    right = [
        float(lmms_letter(text, "".join(one.prompt.options)) == one.references[0])
        if one.prompt.options
        else float(is_right(text, one.references[0]))
        for text, one in zip(texts, asked(MMMU, samples), strict=True)
    ]
    tracks = [one.fields["groups"]["track"] for one in samples]
    by_track = {t: [r for r, own in zip(right, tracks, strict=True) if own == t] for t in tracks}
    assert sum(by_track["Adaptation"]) > 1
    assert scores["accuracy"].value == pytest.approx(sum(sum(own) / len(own) for own in by_track.values()) / 3)
    for track, own in by_track.items():
        assert scores[f"accuracy/track/{track}"].value == pytest.approx(sum(own) / len(own))
    assert scores["likelihood_accuracy/track/Adaptation"].value == 0.5  # of two questions with options
    assert "accuracy/discipline/Engineering" in scores and next(iter(scores)) == "accuracy"


@pytest.mark.parametrize("text", TEXTS)
def test_open_answers(text: str) -> None:
    found = [mmmu_is_right(text, answer) for answer in OPEN]
    assert found == [is_right(text, answer) for answer in OPEN]


def test_open_answers_by_hand() -> None:
    assert mmmu_is_right("The answer is 24.", "24") and mmmu_is_right("so x = 24.004", "24.0")
    assert not mmmu_is_right("240", "24") and not mmmu_is_right("xy", "x") and not mmmu_is_right("", "24")
    assert mmmu_is_right("tomorrow", "tom")  # words within words count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "dev_Alchemy_1"}, "id: 'dev_Alchemy_1' names no subject"),
        ({"id": None}, "id: null; it must be a text"),
        ({"answer": "D"}, "answer: 'D' is none of the options A, B, C"),
        ({"answer": None}, "answer: null; it must be a text"),
        ({"options": None}, "options: None must be a list"),
        ({"question": None}, "question: null; it must be a text"),
    ],
)
def test_bad_records(root: Path, change: dict[str, Any], message: str) -> None:
    write_parquet(root / "VideoMMMU" / "Comprehension" / "test-00000-of-00001.parquet", [row(1), row(3, **change)])
    samples, bad = read(MMMU, root)
    assert len(samples) == 33 and len(bad) == 1
    assert bad[0].startswith(f"VideoMMMU/Comprehension/test-00000-of-00001.parquet:2: {message}")


def test_another_folder(root: Path) -> None:
    write_parquet(root / "VideoMMMU" / "Engineering" / "test-00000-of-00001.parquet", [row(1)])
    _, bad = read(MMMU, root)
    assert len(bad) == 1 and "its folder is called Engineering; put it in one called Perception, " in bad[0]
