"""Letters of answers, top k and groups against cases worked out by hand."""

from __future__ import annotations

import re

import pytest

from vft.metrics import breakdown, extract_letter, official_letter, top_k

NAMED = {
    "C": [
        *("C", " (C) a red car\n", "Best answer: C", "The correct answer would be C", "answer: c"),
        *("the man in the video opens his umbrella as soon as it rains, so C", "It is C.", "I think it is C"),
        *("Judging by the leaves, C", "I think C", "c", "(c)", "C) maple", "**C**", "**C.** maple", "**Answer:** C"),
        *("The answer is **(C) maple**", "I'm sure it's C", "A man walks, so C.", "it is c.", "\\boxed{C}"),
        *("C\nA is wrong", "It’s C, not A", "C, A is wrong", "D is not the answer; C is"),
        *("The answer is C. A and B are not shown", "[C]", "C, maple", "C - maple", "Its C!", "Answer C"),
        *(
            "Final answer: C",
            "答案是C",
            "答案：C。",
            "选C",
            "Cが正解",
            "C maple",
            "The answer is 'C'.",
            "‘C’",
            "“C”",
            "Ｃ",
        ),
        *("（Ｃ）楓", "C、楓", "【C】"),
    ],
    "D": [
        *("D. Because A is wrong", "The answer is: D", "Option: D", "I watched it. Answer: D", "All of them, so D"),
        *("<think>A or B? It's I</think>\nD", "Answer: (d)", "It isn't C; it's D"),
        *("Option A is wrong. The answer is D.", "D.", "(D"),
    ],
    "B": [
        *("The best answer is B.", "The answer (B)", "The correct option is\n\nB", "The answer is not A. It is B"),
        *("(A) is incorrect; (B) is correct", "Neither C nor D, so B", "It cannot be A. B fits"),
        *("It can't be A: B fits", "b", "B is correct", "The correct answer is: **B. birch**", "B or A"),
        "at 5 °C, so B",
    ],
    None: [
        *("", "Ünïcode 犬", "I see a dog", "Definitely blue", "e.g. a dog", "the answer is a dog", "Not A"),
        *("I think it fits", "Answer: A man walks", "It is an X-ray, D-day or a B-roll", "vitamin-C"),
        *("A-frame house", "written in C++ or C#"),
    ],
    "A": [
        *("A: oak", "A", "A red car", "B, C and D are wrong. It is A.", "A is the answer", "the letter is a"),
        *("I would say a.", "A.oak", "The answer is A because the man waves", "Answer: A since it fits"),
        *("I think A fits best", "A or B", "I choose A and C"),
    ],
    "I": [
        *("The answer is I.", "The answer is I", "I. larch", "I", "I believe the answer is I", "I choose I"),
        *("I is the answer", "It's I.", "It is I", "The answer is I because it fits"),
    ],
    "J": [
        *("option J", "Option J is right", "J: beech"),
    ],
    "G": [
        "G",
    ],
    "H": [
        *("H larch", "The answer is H because"),
    ],
}
"""Answers that name each of ten options, I among them, or none."""


@pytest.mark.parametrize(("text", "expected"), [(text, letter) for letter, texts in NAMED.items() for text in texts])
def test_extract_letter(text: str, expected: str | None) -> None:
    assert extract_letter(text, "ABCDEFGHIJ") == expected


def test_letters_without_end_take_no_time() -> None:
    """As a model says them that repeats itself: quadratic work on so many would take minutes."""
    assert extract_letter("C, A, " * 20_000) == "C"


def test_extract_letter_out_of_a_few() -> None:
    assert extract_letter("E") is None and extract_letter("E", "ABCDE") == "E"
    assert extract_letter("E or B") == "B" and extract_letter("C or B", "AB") == "B"
    with pytest.raises(AssertionError):
        extract_letter("A", "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        (" (C) a red car\n", "C"),
        ("The best answer is B.", "B"),
        ("The correct option is D", "D"),
        ("Answer: C", "C"),  # not the A of Answer
        ("Best answer: C", "B"),  # a comma is missing in the script's list
        ("All of them, so D", "A"),  # within a word
        ("answer: c", None),
        ("", None),
        ("the man in the video opens his umbrella as soon as it rains", None),
        ("the man in the video opens his umbrella as soon as it rains, so C", "C"),
        ("E", None),
    ],
)
def test_official_letter(text: str, expected: str | None) -> None:
    """As Video-MME's script has it."""
    assert official_letter(text) == expected


@pytest.mark.parametrize(
    ("scores", "right", "least_k"),
    [
        ([0.1, 0.7, 0.2], {1}, 1),
        ([0.1, 0.7, 0.2], {2}, 2),
        ([0.1, 0.7, 0.2], {0}, 3),
        ([0.5, 0.5, 0.1], {0}, 2),  # a tie counts against the model, whichever stands first
        ([0.5, 0.5, 0.1], {1}, 2),
        ([0.0, 0.0, 0.0, 0.0], {0}, 4),
        ([float("nan"), 1.0], {0}, 2),
        ([float("nan"), 1.0], {1}, 2),
        ([-3.0], {0}, 1),
        # Of several right ones one is enough, and another one ahead of it does no harm.
        ([0.1, 0.7, 0.2], {0, 2}, 2),
        ([0.1, 0.7, 0.2], {0, 1}, 1),
        ([0.5, 0.5, 0.1], {0, 1}, 1),  # right ones alone: no tie
        ([0.5, 0.5, 0.5], {0, 1}, 2),
        ([float("nan"), 1.0, 0.5], {0, 2}, 2),
        ([0.1, 0.2], {0, 1}, 1),
    ],
)
def test_top_k(scores: list[float], right: set[int], least_k: int) -> None:
    assert [top_k(scores, right, k) for k in range(1, 6)] == [k >= least_k for k in range(1, 6)]


@pytest.mark.parametrize(("right", "k"), [({0}, 0), ({2}, 1), ({-1}, 1), (set(), 1)])
def test_top_k_refuses(right: set[int], k: int) -> None:
    with pytest.raises(AssertionError, match=re.escape(f"{k}, {right}, 2")):
        top_k([0.1, 0.2], right, k)


def test_breakdown() -> None:
    correct, short = [1, 0, 1, 1], {"duration": "short"}
    groups = [{"topic": "sport", **short}, {"duration": "long", "topic": "sport"}, short, {}]
    means = {name: score.value for name, score in breakdown(correct, groups).items()}
    assert list(means.items()) == [("duration/long", 0), ("duration/short", 1), ("topic/sport", 0.5)]
    # By key, then value, not by the letters of both: "-" stands before "/".
    assert list(breakdown([1, 1], [{"a-b": "x"}, {"a": "y"}])) == ["a/y", "a-b/x"]
    assert breakdown([1], [{"topic": "food/drink"}])["topic/food/drink"].value == 1
    with pytest.raises(ValueError, match="1 scores, but groups for 2"):
        breakdown([1], [{}, {}])
    with pytest.raises(ValueError, match="two groups are called 'a/b/c'"):
        breakdown([1, 0], [{"a/b": "c"}, {"a": "b/c"}])
