"""CIDEr-D against pycocoevalcap."""

from __future__ import annotations

import pytest

from vft.metrics import cider_d_scores, cider_d_text_scores

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
def test_equals_pycocoevalcap(name: str) -> None:
    predictions, references, expected = CASES[name]
    words = [text.split() for text in predictions]
    reference_words = [[text.split() for text in refs] for refs in references]
    assert cider_d_scores(words, reference_words) == pytest.approx(expected, abs=1e-6)
    assert cider_d_text_scores(predictions, references) == pytest.approx(expected, abs=1e-6)


def test_case_and_punctuation_do_not_count() -> None:
    plain, references, expected = CASES["plain"]
    shouted = [f"{text.upper()}!" for text in plain]
    assert cider_d_text_scores(shouted, references) == pytest.approx(expected, abs=1e-6)


def test_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        cider_d_text_scores(["a dog"], [["a dog"]])
