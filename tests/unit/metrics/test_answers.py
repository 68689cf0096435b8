"""ANLS, token F1 and segment coverage against values worked out by hand and a plain edit distance."""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from vft.metrics import anls_scores, segment_coverage_scores, token_f1_scores


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and substitutions from one text to the other, by the textbook's table."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


@pytest.mark.parametrize(
    ("said", "references", "expected"),
    [
        ("harbour", ["harbour"], 1.0),
        ("  HARBOUR\n", ["Harbour "], 1.0),
        ("harbor", ["harbour"], 6 / 7),  # one letter missing of seven
        ("kitten", ["sitting"], 4 / 7),  # three edits, seven letters
        ("harbor", ["station", "harbour", "bay"], 6 / 7),
        ("ab", ["ac"], 0.5),  # as similar as the threshold
        ("abc", ["axy"], 0.0),  # a third: below it
        ("", ["dog"], 0.0),
        ("dog", [""], 0.0),
        ("", [""], 1.0),
        ("Ünïcode 犬", ["ünïcode 猫"], 8 / 9),  # letters, not bytes
    ],
)
def test_anls(said: str, references: list[str], expected: float) -> None:
    assert anls_scores([said], [references]) == pytest.approx([expected])


def test_anls_threshold() -> None:
    predictions, references = ["kitten", "abc"], [["sitting"], ["axy"]]
    assert anls_scores(predictions, references, threshold=0) == pytest.approx([4 / 7, 1 / 3])
    assert anls_scores(predictions, references, threshold=0.6) == [0, 0]
    with pytest.raises(AssertionError, match="50"):
        anls_scores(predictions, references, threshold=50)


def test_anls_equals_a_plain_edit_distance() -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("é犬 ", weights=[2, 4, 1], k=generator.randrange(9))) for _ in range(80)]
    expected = []
    for said, right in zip(texts[:40], texts[40:], strict=True):
        a, b = said.strip(), right.strip()
        expected.append(1 - edit_distance(a, b) / max(len(a), len(b), 1))
    assert anls_scores(texts[:40], [[t] for t in texts[40:]], threshold=0) == pytest.approx(expected)
    cut = [similarity if similarity >= 0.5 else 0 for similarity in expected]
    assert anls_scores(texts[:40], [[t] for t in texts[40:]]) == pytest.approx(cut)
    assert 5 < cut.count(0) < 35


@pytest.mark.parametrize(
    ("said", "references", "expected"),
    [
        ("The red car!", ["a RED car"], 1.0),
        ("red car", ["red sports car"], 0.8),  # precision 1, recall 2/3
        ("car car car", ["car"], 0.5),  # a word counts as often as both have it: 1/3 and 1
        ("car car", ["car car red"], 0.8),
        ("car red", ["red car"], 1.0),
        ("a blue van", ["red car", "van", "van on road"], 2 / 3),  # best is "van": 1/2 and 1
        ("U.S.A.", ["usa"], 1.0),  # punctuation goes without leaving a space
        ("theatre", ["atre"], 0.0),  # an article is a whole word
        ("Ünïcode 犬", ["ünïcode 猫"], 0.5),
        ("", ["dog"], 0.0),
        ("the", ["dog"], 0.0),
        ("dog", ["?!"], 0.0),
        ("", ["The."], 1.0),
    ],
)
def test_token_f1(said: str, references: list[str], expected: float) -> None:
    assert token_f1_scores([said], [references]) == pytest.approx([expected])


def test_token_f1_keeps_the_order_of_predictions() -> None:
    assert token_f1_scores(["dog", "cat", "red car"], [["dog"], ["dog"], ["car"]]) == pytest.approx([1, 0, 2 / 3])


STORY = "A man opens the door. He walks his dog in the park!\n- then it rains\n- people run"


@pytest.mark.parametrize(
    ("segments", "threshold", "expected"),
    [
        (["a man opens a door"], 0.8, 1.0),  # 4 of its 5 words in order
        (["a man opens a door"], 0.81, 0.0),
        (["he walks", "it snows", "it rains", "a cat sleeps"], 0.6, 2 / 4),
        (["he walks", "it snows", "it rains", "a cat sleeps"], 0.5, 3 / 4),  # half of "it snows" is said
        (["man door dog park"], 0.6, 0.0),  # no single sentence has more than two of them
        (["park the in dog"], 0.5, 0.0),  # all are said, but never two in this order
        (["it rains people run"], 0.6, 0.0),  # lines are apart
        (["man x y z"], 0.25, 1.0),
        (["?!", "it rains"], 0.3, 0.5),  # without a word, never said
    ],
)
def test_segment_coverage(segments: list[str], threshold: float, expected: float) -> None:
    assert segment_coverage_scores([STORY], [segments], threshold) == pytest.approx([expected])


def test_segment_coverage_is_recall_of_the_best_sentence() -> None:
    sentences = ["The dog, 3.5 years old, barks loudly at a passing car.", "Rain!"]
    segments = ["a dog barks at cars", "rain falls on the roof", "people dance", "rain in a café"]
    scorer = RougeScorer(["rougeL"])
    best = [max(scorer.score(segment, s)["rougeL"].recall for s in sentences) for segment in segments]
    for threshold in (0.1, 0.3, 0.5, 0.9):
        expected = sum(recall >= threshold for recall in best) / 4
        assert segment_coverage_scores([" ".join(sentences)], [segments], threshold) == [expected]


def test_segment_coverage_of_nothing_said() -> None:
    assert segment_coverage_scores(["", " \n", "it rains"], [["it rains"]] * 3) == [0, 0, 1]


@pytest.mark.parametrize("threshold", [0, 1.5])
def test_segment_coverage_threshold(threshold: float) -> None:
    with pytest.raises(AssertionError, match=f"{threshold}"):
        segment_coverage_scores(["a"], [["a"]], threshold)
