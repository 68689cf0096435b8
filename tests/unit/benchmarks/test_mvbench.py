"""MVBench in its published layout, and its rule for letters beside another writing of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.benchmarks import answered, asked, read, write_json
from vft import benchmarks
from vft.benchmarks.mvbench import FOLDERS

MVBENCH = benchmarks.find("mvbench")
TEXTS = [
    "A", "B", "b", "(B)", "(b) red", "B. red", "b. a red car", "B.red", "The answer is B.", "Answer: (C) up",
    "A person opens the door.", "It is the red one, option B", "C,D", "red", "", "  D  ", "'D'", "\"D\"", "E", "F",
    "Best option:(D)", "Best option: (D) it, falls", "a", "I think e", "3,4 B", "B/C", "B / C", "B-C", "x.B", "1.5 B",
    "B\nbecause", "A. first\nB. second", "\tC", "{C}", "option_C", "C?", "C!", "The best option is (A).", "D) down",
]  # fmt: skip


def letter(text: str) -> str:
    """As lmms-eval: a text of more than a letter is compared as it is after cleaning, and never equals one."""
    opening = re.match(r"^([A-E])\.\s*(.+)$", text.strip(), re.IGNORECASE)
    if opening:
        return opening.group(1).upper()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]:
        gone = mark + " " in text or " " + mark in text or re.search(r"(\d)(,)(\d)", text) is not None
        cleaned = cleaned.replace(mark, "" if gone else " ")
    cleaned = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", cleaned, re.UNICODE)
    for around in ("'", '"', ")", "("):
        cleaned = cleaned.strip(around)
    found = re.search(r"\b([A-E])\b", cleaned.strip().lower(), re.IGNORECASE)
    return found.group(1).upper() if found else cleaned


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, task in enumerate(("action_sequence", "moving_count", "episodic_reasoning")):
        rows = [
            {"video": f"v{i}.mp4", "question": f"What {i}?", "candidates": ["up", "down", "left", "right"][: 3 + i % 2],
             "answer": ["up", "down", "left"][i % 3], "start": 1.5, "end": 4.0, "accurate_start": 2, "fps": 3}
            for i in range(13)
        ]  # fmt: skip
        write_json(tmp_path / "MVBench" / "json" / f"{task}.json", rows)
        folder = FOLDERS[task][number % len(FOLDERS[task])]
        for i in range(13):
            file = tmp_path / "MVBench" / "video" / folder / f"v{i}.mp4"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"")
    return tmp_path


def test_what_is_asked(root: Path) -> None:
    samples, bad = read(MVBENCH, root)
    assert not bad and len(samples) == 39
    first = next(one for one in samples if one.fields["groups"] == {"task": "action_sequence"})
    video, text = first.turns[0].parts
    assert text == "Question:What 0?\nOption:\n(A) up\n(B) down\n(C) left\nOnly give the best option.\n"
    assert video.path.parts[-3:] == ("star", "Charades_segment", "v0.mp4") and video.options.video_start is None
    assert first.fields["options"] == ("A", "B", "C") and first.turns[1].text == "A"
    assert len({one.id for one in samples}) == 39


def test_videos_that_are_not_cut(root: Path) -> None:
    folder = root / "MVBench" / "video" / "star"
    (folder / "Charades_segment").rename(folder / "Charades_v1_480")
    samples, _ = read(MVBENCH, root, path="MVBench/json/action_sequence.json")
    video = samples[0].turns[0].parts[0]
    assert video.path.parent.name == "Charades_v1_480"
    assert (video.options.video_start, video.options.video_end) == (1.5, 4.0)


def test_videos_of_questions_that_were_replaced(root: Path) -> None:
    folder = root / "MVBench" / "video"
    place = folder / "data0613" / "star" / "Charades_v1_480" / "v0.mp4"
    place.parent.mkdir(parents=True)
    (folder / "star" / "Charades_segment" / "v0.mp4").rename(place)
    samples, _ = read(MVBENCH, root, path="MVBench/json/action_sequence.json")
    video = samples[0].turns[0].parts[0]
    assert video.path == place and video.options.video_start == 1.5


def test_scores(root: Path) -> None:
    samples, _ = read(MVBENCH, root)
    answers = answered(MVBENCH, samples, TEXTS)
    right = [float(letter(text) == one.references[0]) for text, one in zip(TEXTS, asked(MVBENCH, samples), strict=True)]
    tasks = [one.fields["groups"]["task"] for one in samples]
    by_task = {task: [r for r, own in zip(right, tasks, strict=True) if own == task] for task in tasks}
    scores = MVBENCH.score(answers)
    assert sum(right) > 5
    assert scores["accuracy"].value == pytest.approx(sum(sum(own) / len(own) for own in by_task.values()) / 3)
    for task, own in by_task.items():
        assert scores[f"accuracy/task/{task}"].value == pytest.approx(sum(own) / len(own))
    assert scores["likelihood_accuracy"].value == pytest.approx(
        sum(o.references[0] == "A" for o in asked(MVBENCH, samples)) / 39
    )


@pytest.mark.parametrize("text", TEXTS)
def test_letters(text: str) -> None:
    found = letter(text)
    assert MVBENCH.letter_of(text, 4) == (found if len(found) == 1 and found in "ABCDE" else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "sideways"}, "answer: 'sideways' is none of the options up, down, left"),
        ({"candidates": "up"}, "candidates: 'up' must be a list of at least 2 texts"),
        ({"candidates": ["up", 3]}, r"candidates\[1\]: 3 is of type int"),
        ({"video": None}, "video: null; it must be a text"),
        ({"video": "../../../../../../x.mp4"}, "out of data.root"),
    ],
)
def test_bad_records(root: Path, change: dict[str, object], message: str) -> None:
    row = {"video": "v0.mp4", "question": "?", "candidates": ["up", "down", "left"], "answer": "up"}
    write_json(root / "MVBench" / "json" / "moving_count.json", [row, row | change])
    samples, bad = read(MVBENCH, root, path="MVBench/json/moving_count.json")
    assert len(samples) == 1 and len(bad) == 1 and bad[0].startswith("MVBench/json/moving_count.json:1:")
    assert re.search(message, bad[0])
