"""Letters of answers, top k and groups against cases worked out by hand."""

from __future__ import annotations

import re

import pytest

from vft.metrics import breakdown, extract_letter, official_letter, top_k


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("C", "C"),
        (" (C) a red car\n", "C"),
        ("D. Because A is wrong", "D"),
        ("The best answer is B.", "B"),
        ("The answer is: D", "D"),
        ("The answer (B)", "B"),
        ("Best answer: C", "C"),
        ("Option: D", "D"),
        ("The correct answer would be C", "C"),
        ("I watched it. Answer: D", "D"),
        ("All of them, so D", "D"),
        ("answer: c", "C"),
        ("", None),
        ("Ünïcode 犬", None),
        ("the man in the video opens his umbrella as soon as it rains, so C", "C"),
        ("It is C.", "C"),
        ("I think it is C", "C"),
        ("Judging by the leaves, C", "C"),
        ("I think C", "C"),
        ("A: oak", "A"),
        ("c", "C"),
        ("(c)", "C"),
        ("C) maple", "C"),
        ("The answer is I.", "I"),
        ("The answer is I", "I"),
        ("option J", "J"),
        ("Option J is right", "J"),
        ("**C**", "C"),
        ("**C.** maple", "C"),
        ("**Answer:** C", "C"),
        ("The answer is **(C) maple**", "C"),
        ("I'm sure it's C", "C"),
        ("I. larch", "I"),
        ("I", "I"),
        ("A", "A"),
        ("A red car", "A"),
        ("A man walks, so C.", "C"),
        ("I see a dog", None),
        ("Definitely blue", None),
        ("e.g. a dog", None),
        ("it is c.", "C"),
        ("the answer is a dog", None),
        ("\\boxed{C}", "C"),
        ("<think>A or B? It's I</think>\nD", "D"),
        ("J: beech", "J"),
        ("Answer: (d)", "D"),
        ("The correct option is\n\nB", "B"),
        ("C\nA is wrong", "C"),
        ("The answer is not A. It is B", "B"),
        ("It isn't C; it's D", "D"),
        ("It’s C, not A", "C"),
        ("(A) is incorrect; (B) is correct", "B"),
        ("B, C and D are wrong. It is A.", "A"),
        ("C, A is wrong", "C"),
        ("Neither C nor D, so B", "B"),
        ("Not A", None),
        ("It cannot be A. B fits", "B"),
        ("It can't be A: B fits", "B"),
        ("D is not the answer; C is", "C"),
        ("The answer is C. A and B are not shown", "C"),
        ("Option A is wrong. The answer is D.", "D"),
        ("[C]", "C"),
        ("C, maple", "C"),
        ("C - maple", "C"),
        ("Its C!", "C"),
        ("G", "G"),
        ("H larch", "H"),
        ("The answer is H because", "H"),
        ("Answer C", "C"),
        ("Final answer: C", "C"),
        ("I believe the answer is I", "I"),
        ("I choose I", "I"),
        ("D.", "D"),
        ("(D", "D"),
        ("b", "B"),
        ("B is correct", "B"),
        ("The correct answer is: **B. birch**", "B"),
        ("答案是C", "C"),
        ("答案：C。", "C"),
        ("选C", "C"),
        ("Cが正解", "C"),
        ("A is the answer", "A"),
        ("I is the answer", "I"),
        ("the letter is a", "A"),
        ("I would say a.", "A"),
        ("A.oak", "A"),
        ("C maple", "C"),
        ("It's I.", "I"),
        ("It is I", "I"),
        ("The answer is A because the man waves", "A"),
        ("The answer is I because it fits", "I"),
        ("Answer: A since it fits", "A"),
        ("I think A fits best", "A"),
        ("I think it fits", None),
        ("Answer: A man walks", None),
        ("A or B", "A"),
        ("B or A", "B"),
        ("I choose A and C", "A"),
        ("The answer is 'C'.", "C"),
        ("‘C’", "C"),
        ("“C”", "C"),
        ("Ｃ", "C"),
        ("（Ｃ）楓", "C"),
        ("C、楓", "C"),
        ("【C】", "C"),
        ("It is an X-ray, D-day or a B-roll", None),
        ("vitamin-C", None),
        ("A-frame house", None),
        ("written in C++ or C#", None),
        ("at 5 °C, so B", "B"),
    ],
)
def test_extract_letter(text: str, expected: str | None) -> None:
    """Out of ten options, I among them."""
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
