"""WUPS on a small taxonomy in the place of WordNet, beside another writing of the authors' rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.taxonomy import LEMMAS, PARENTS, Taxonomy
from vft.common.errors import UserError
from vft.metrics import wups

WORDS = ["dog", "cat", "bird", "car", "sofa", "run", "walk", "animal", "zebra", "3"]


@pytest.fixture
def taxonomy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from Taxonomy.in_place_of_nltk(monkeypatch)


def path(word: str) -> list[str]:
    """From a word up to the root of its tree."""
    return [word, *(path(PARENTS[word]) if PARENTS[word] else [])]


def alike(one: str, other: str, threshold: float) -> float:
    if one == other:
        return 1.0
    if one not in PARENTS or other not in PARENTS:
        return 0.0
    shared = [word for word in path(one) if word in path(other)]
    score = 2 * len(path(shared[0])) / (len(path(one)) + len(path(other))) if shared else 0.0
    return 0.1 * score if score < threshold else score


def by_the_rule(one: list[str], other: list[str], threshold: float) -> float:
    products = []
    for words, others in ((one, other), (other, one)):
        product, found = 1.0, False
        for word in words:
            best = 0.0
            for another in others:
                best = max(best, alike(word, another, threshold))
            if best > 0:
                product, found = product * best, True
        products.append(product if found else 0.0)
    return min(products)


@pytest.mark.usefixtures("taxonomy")
@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_scores(threshold: float) -> None:
    scores = set()
    for count, other_count in itertools.product((0, 1, 2), (1, 2)):
        for one in itertools.permutations(WORDS, count):
            for other in list(itertools.permutations(WORDS, other_count))[::7]:
                found = wups.wups_score(" ".join(one), " ".join(other), threshold)
                assert found == pytest.approx(by_the_rule(list(one), list(other), threshold), abs=1e-12)
                scores.add(round(found, 9))
    assert len(scores) > 10 and {0.0, 1.0} <= scores


@pytest.mark.usefixtures("taxonomy")
def test_words() -> None:
    assert wups.content_words("The dogs were running") == "dog run"
    assert wups.content_words("because he 's NOT on the sofas") == "'s not on sofa"
    assert wups.content_words("Zebras moves") == "zebras move"  # unknown words stay, others get their stem
    assert wups.content_words("it is the") == "" and wups.wups_score("", "dog", 0.0) == 0.0
    assert "no" not in wups.IGNORED and "two" not in wups.IGNORED and LEMMAS["were"] in wups.IGNORED


def test_without_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        def __getattr__(self, name: str) -> Any:
            raise LookupError("Resource punkt_tab not found")

    wups.nltk.cache_clear()
    monkeypatch.setattr(wups, "optional_module", lambda *names: Bare())
    with pytest.raises(UserError, match=r"^WUPS needs data of nltk, .*: python -m nltk.downloader wordnet [a-z_ ]+$"):
        wups.nltk()
    wups.nltk.cache_clear()
