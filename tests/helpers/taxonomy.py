"""A few words in the place of nltk's WordNet, tokenizer and tagger, whose data may not be here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from vft.metrics import wups

PARENTS = {
    "entity": "", "animal": "entity", "artifact": "entity", "vehicle": "artifact", "dog": "animal", "cat": "animal",
    "bird": "animal", "car": "vehicle", "sofa": "artifact", "act": "", "move": "act", "run": "move", "walk": "move",
}  # fmt: skip
LEMMAS = {"dogs": "dog", "cats": "cat", "sofas": "sofa", "were": "be", "running": "run", "walks": "walk", "cars": "car"}
TAGS = {"running": "VBG", "walks": "VBZ", "moves": "VBZ", "were": "VBD", "the": "DT", "on": "IN"}


class Taxonomy:
    """What `vft.metrics.wups` uses of nltk."""

    class PorterStemmer:
        """Takes an `s` away."""

        def stem(self, word: str) -> str:
            return word.removesuffix("s")

    class WordNetLemmatizer:
        """Knows `LEMMAS`; a verb as a noun has none."""

        def lemmatize(self, word: str, part: str) -> str:
            return LEMMAS.get(word, word) if part == "v" or TAGS.get(word, "NN") == "NN" else word

    @staticmethod
    def word_tokenize(text: str) -> list[str]:
        return re.findall(r"[\w']+|[^\w\s]", text)

    @staticmethod
    def pos_tag(words: list[str]) -> list[tuple[str, str]]:
        return [(word, TAGS.get(word.lower(), "NN")) for word in words]

    class corpus:
        """A synset for each word of `PARENTS`."""

        class wordnet:
            @staticmethod
            def synsets(word: str) -> list[Meaning]:
                return [Meaning(word), Meaning("entity")] if word in PARENTS else []

    @staticmethod
    def in_place_of_nltk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """For the time of a test."""
        remembered = (wups.content_words, wups._similarity)
        monkeypatch.setattr(wups, "nltk", Taxonomy)  # called, it gives an object with what is used of the package
        for one in remembered:
            one.cache_clear()
        yield
        for one in remembered:
            one.cache_clear()


class Meaning(SimpleNamespace):
    """A synset."""

    def __init__(self, word: str) -> None:
        self.line = [word]
        while PARENTS[self.line[-1]]:
            self.line.append(PARENTS[self.line[-1]])

    def wup_similarity(self, other: Meaning) -> float | None:
        """Wu and Palmer's, with depths from 1; None for words of two trees."""
        shared = next((i for i, word in enumerate(self.line) if word in other.line), None)
        if shared is None:
            return None
        return 2.0 * (len(self.line) - shared) / (len(self.line) + len(other.line))
