"""Scores of texts against values worked out by hand, rouge-score, a plain edit distance and pycocoevalcap."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence

import pytest
from rouge_score.rouge_scorer import RougeScorer

from vft.common.errors import UserError
from vft.metrics import (
    anls_scores,
    bleu4_interval,
    cider_d_scores,
    distinct_n,
    exact_match_scores,
    is_right_option,
    rouge_l_scores,
    segment_coverage_scores,
    token_f1_scores,
)
from vft.metrics.words import tokenize

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], object]


def test_tokenize() -> None:
    assert " ".join(tokenize("It's a BLACK-and-white cat, isn't it?\n")) == "its a black and white cat isnt it"
    assert tokenize("Ünïcode naïve_snake 3.5") == ["ünïcode", "naïve", "snake", "3", "5"]
    assert tokenize("?!") == []


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        # 6 words against 6: matching n-grams 5/6, 4/5, 3/4, 2/3 and no brevity penalty.
        (["the dog runs along the beach"], [["the dog runs along the shore"]], (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25),
        # 5 words against 10, all matching: the brevity penalty alone.
        (["a b c d e"], [["a b c d e f g h i j"]], math.exp(1 - 10 / 5)),
        (
            ["a red car drives by", "two men play chess now"],
            [["x", "a red car drives by"], ["two men play chess now"]],
            1,
        ),
    ],
)
def test_bleu4(predictions: list[str], references: list[list[str]], expected: float) -> None:
    assert bleu4_interval(predictions, references).value == pytest.approx(100 * expected)


def test_rouge_l() -> None:
    # Longest common subsequence "the dog the beach" of 4 words; 6 predicted, 5 in the reference.
    precision, recall = 4 / 6, 4 / 5
    expected = 2 * precision * recall / (precision + recall)
    two = [["no match", "the dog on the beach"]]
    assert rouge_l_scores(["the dog runs along the beach"], two) == pytest.approx([expected])
    assert rouge_l_scores(["the dog", "a cat"], [["the dog"], ["nothing else"]]) == [1, 0]


def test_rouge_l_scores_equal_rouge_score() -> None:
    predictions = ["the dog runs along the beach", "", "Ünïcode 犬 dog", "a cat sits"]
    references = [["a dog on the beach", "the beach"], ["nothing"], ["a dog", "naïve dog"], ["a cat sits"]]
    scorer = RougeScorer(["rougeL"])
    expected = [
        max(scorer.score(ref, text)["rougeL"].fmeasure for ref in refs)
        for text, refs in zip(predictions, references, strict=True)
    ]
    assert rouge_l_scores(predictions, references) == pytest.approx(expected)
    assert expected[1] == 0 < expected[2] < expected[3] == 1


def test_rouge_l_of_other_scripts() -> None:
    """rouge-score's own words are a-z and digits: it would score every Chinese or Russian answer 0."""
    assert rouge_l_scores(["собака бежит по пляжу"], [["Собака по пляжу."]]) == pytest.approx([2 * 3 / 7])
    assert rouge_l_scores(["狗跑了"], [["狗在跑"]]) == pytest.approx([2 / 3])  # two of three ideographs in order
    assert rouge_l_scores(["ไป", "犬が走る"], [["ไป"], ["犬が走る"]]) == [1, 1]
    # An accented letter is no other script: figures stay those of rouge-score.
    assert rouge_l_scores(["café au lait"], [["cafe au lait"]]) == pytest.approx([2 / 3])


def test_exact_match() -> None:
    predictions, references = ["A dog.", "cat", "tree", ""], [["a dog"], ["dog", "Cat!"], ["trees"], ["?"]]
    assert exact_match_scores(predictions, references) == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("text", "right", "options", "expected"),
    [
        ("A+", ["A+"], ["A+", "A-", "A"], True),
        ("a-.", ["A+"], ["A+", "A-", "A"], False),
        ("A", ["A+"], ["A+", "A-", "A"], False),
        ("(A+)", ["A+"], ["A+", "A-", "A"], False),  # in its words it is any of the three
        ("(A+)", ["A+"], ["A+", "B+"], True),
        ("(A+)", ["A+", "A-"], ["A+", "A-", "B"], True),
        ("+", ["+"], ["+", "-"], True),
        ("-", ["+"], ["+", "-"], False),
        ("", ["+"], ["+", "x"], False),
        ("5", ["5%"], ["5", "5%"], False),
        ("1,000", ["1.000"], ["1.000", "1,000"], False),
        ("2+3", ["2-3"], ["2+3", "2-3"], False),
        ("dog", ["Dog"], ["Dog", "dog"], False),
        ("DOG", ["Dog"], ["Dog", "cat"], True),
        ("pick up", ["pick_up"], ["pick_up", "put_down"], True),
        (" Pick-Up.\n", ["pick_up"], ["pick_up", "pick up"], False),
        ("cat", ["dog"], [], False),
        ("Dog!", ["dog"], [], True),
    ],
)
def test_an_option_is_told_from_others_of_its_words(
    text: str, right: list[str], options: list[str], expected: bool
) -> None:
    assert is_right_option(text, right, options) == expected


def test_distinct_n() -> None:
    texts = ["a dog and a dog", "a cat"]  # 7 words, 4 different; 5 pairs of words, 4 different
    assert [distinct_n(texts, n) for n in (1, 2, 6)] == pytest.approx([4 / 7, 4 / 5, 0])


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and substitutions from one text to the other, by the textbook's table."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
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
def test_anls(prediction: str, references: list[str], expected: float) -> None:
    assert anls_scores([prediction], [references]) == pytest.approx([expected])


def test_anls_equals_a_plain_edit_distance() -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("é犬 ", weights=[2, 4, 1], k=generator.randrange(9))) for _ in range(80)]
    expected = []
    for prediction, reference in zip(texts[:40], texts[40:], strict=True):
        a, b = prediction.strip(), reference.strip()
        similarity = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
        expected.append(similarity if similarity >= 0.5 else 0)
    assert anls_scores(texts[:40], [[t] for t in texts[40:]]) == pytest.approx(expected)
    assert 5 < expected.count(0) < 35


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
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
def test_token_f1(prediction: str, references: list[str], expected: float) -> None:
    assert token_f1_scores([prediction], [references]) == pytest.approx([expected])


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


# Each prediction's score by `CiderScorer(n=4, sigma=6.0)` of pycocoevalcap 1.2, run on these texts as they stand.
CASES: dict[str, tuple[list[str], list[list[str]], list[float]]] = {
    "plain": (
        ["a dog runs along the beach", "two men play chess in a park", "a woman slices a red onion"],
        [
            ["a dog is running on the beach", "the brown dog runs along the sea"],
            ["two old men are playing chess", "men play chess outside in a park"],
            ["a woman cuts an onion", "someone slices a red onion on a board"],
        ],
        [3.68114893749, 2.99137944796, 3.06230643222],
    ),
    "identical": (
        ["a cat sleeps on a warm sofa", "a train leaves the station at night"],
        [["a cat sleeps on a warm sofa"], ["a train leaves the station at night"]],
        [10.0, 10.0],
    ),
    "repeated words, clipped": (
        ["the the the the the the", "red red car car car drives", "a boy jumps"],
        [
            ["the boy kicks the ball", "a boy kicks a ball"],
            ["a red car drives by"],
            ["the boy jumps over a puddle", "a kid jumps", "jumping boy"],
        ],
        [0.18524321568, 1.92028415341, 1.34036136621],
    ),
    "lengths far apart": (
        [
            "snow",
            "a very long caption that goes on and on about many small things that nobody else mentions "
            "in the video at all",
            "people dance",
        ],
        [
            ["snow falls on the quiet village and covers the roofs of all houses in white"],
            ["a caption"],
            ["people dance in a large hall", "people dance"],
        ],
        [0.0409065743813, 0.00209105831533, 3.63244807364],
    ),
    "unseen words and no words": (
        ["zebra quagga okapi", "", "a man sings"],
        [["a horse eats grass"], ["nothing happens"], ["a man sings on stage", "the singer performs"]],
        [0.0, 0.0, 2.36857923846],
    ),
    "words that all share": (
        ["a man walks", "a man talks", "a man eats", "a man walks"],
        [["a man walks", "a man walks slowly"], ["a man talks"], ["a man eats"], ["a man runs", "a man jogs", "a man"]],
        [6.36507652464, 7.5, 7.5, 0.0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_cider_d_equals_pycocoevalcap(name: str) -> None:
    """Case and punctuation do not count."""
    predictions, references, expected = CASES[name]
    for texts in (predictions, [f"{text.upper()}!" for text in predictions]):
        assert cider_d_scores(texts, references) == pytest.approx(expected, abs=1e-6)


def test_cider_d_of_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        cider_d_scores(["a dog"], [["a dog"]])


WITH_REFERENCES: list[Metric] = [
    anls_scores,
    bleu4_interval,
    cider_d_scores,
    exact_match_scores,
    rouge_l_scores,
    token_f1_scores,
]


@pytest.mark.parametrize(
    ("metric", "name"), [*((m, "references") for m in WITH_REFERENCES), (segment_coverage_scores, "segments")]
)
def test_misfits_are_refused_with_both_numbers(metric: Metric, name: str) -> None:
    with pytest.raises(ValueError, match=f"2 predictions, but {name} for 1"):
        metric(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match=f"prediction 1 has 0 {name}"):
        metric(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=f"{name} of prediction 0: a list of texts"):
        metric(["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="no predictions"):
        metric([], [])


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [
        (bleu4_interval, "sacrebleu", "sacrebleu"),
        (rouge_l_scores, "rouge_score.rouge_scorer", "rouge-score"),
        (segment_coverage_scores, "rouge_score.rouge_scorer", "rouge-score"),
        (anls_scores, "rapidfuzz.distance", "rapidfuzz"),
    ],
)
def test_missing_package_names_the_extra(
    metric: Metric, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs {package}, .*vft\[eval\]"):
        metric(["a"], [["a"]])
