"""BLEU-4, ROUGE-L, exact match and distinct-n against values worked out by hand."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import pytest
from rouge_score.rouge_scorer import RougeScorer

from vft.common.errors import UserError
from vft.metrics import (
    anls_scores,
    bleu4,
    bleu4_interval,
    cider_d_text_scores,
    distinct_n,
    exact_match_scores,
    is_right_option,
    rouge_l_scores,
    segment_coverage_scores,
    token_f1_scores,
    tokenize,
)

Metric = Callable[[Sequence[str], Sequence[Sequence[str]]], object]


def test_tokenize() -> None:
    assert " ".join(tokenize("It's a BLACK-and-white cat, isn't it?\n")) == "its a black and white cat isnt it"
    assert tokenize("Ünïcode naïve_snake 3.5") == ["ünïcode", "naïve", "snake", "3", "5"]
    assert tokenize("?!") == []


def test_bleu4() -> None:
    # 6 words against 6: matching n-grams 5/6, 4/5, 3/4, 2/3 and no brevity penalty.
    expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu4(["the dog runs along the beach"], [["the dog runs along the shore"]]) == pytest.approx(expected)
    # 5 words against 10, all matching: the brevity penalty alone.
    assert bleu4(["a b c d e"], [["a b c d e f g h i j"]]) == pytest.approx(100 * math.exp(1 - 10 / 5))


def test_bleu4_takes_uneven_references() -> None:
    predictions = ["a red car drives by", "two men play chess now"]
    references = [["someone else", "a red car drives by"], ["two men play chess now"]]
    assert bleu4(predictions, references) == pytest.approx(100)


def test_rouge_l() -> None:
    # Longest common subsequence "the dog the beach" of 4 words; 6 said, 5 in the reference.
    precision, recall = 4 / 6, 4 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l_scores(["the dog runs along the beach"], [["the dog on the beach"]]) == pytest.approx([expected])
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
    assert rouge_l_scores(predictions[:1], references[:1]) == pytest.approx(expected[:1])


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
    assert distinct_n(texts, 1) == pytest.approx(4 / 7)
    assert distinct_n(texts, 2) == pytest.approx(4 / 5)
    assert distinct_n(texts, 6) == 0.0
    with pytest.raises(AssertionError, match="0"):
        distinct_n(texts, 0)


WITH_REFERENCES: list[Metric] = [
    anls_scores,
    bleu4,
    bleu4_interval,
    cider_d_text_scores,
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
        (bleu4, "sacrebleu", "sacrebleu"),
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
