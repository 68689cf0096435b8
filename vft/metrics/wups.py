"""WUPS: how alike two short answers are in WordNet (Malinowski and Fritz 2014), as NExT-QA's authors score it.

Source: doc-doc/NExT-OE, `metrics.py` and `eval_oe.py`; words are brought to their base form as by pywsd's
`lemmatize_sentence`, which they call. nltk and its data are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from vft.common.errors import UserError
from vft.metrics.words import optional_module

_IGNORED = """
    i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his
    himself she she's her hers herself it it's its itself they them their theirs themselves what which who whom this
    that that'll these those am is are was were be been being have has had having do does did doing a an the and but if
    or because as until while to from of at for with about into through during again further then here there when where
    why how all any each most other some such only own so than too very s t can will just don don't should should've
    now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't
    isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won
    won't wouldn wouldn't
"""
IGNORED = frozenset(_IGNORED.split())
"""Words that the authors leave out: nltk's list but for negations and words of place, time and number."""
_PARTS = {"NN": "n", "JJ": "a", "VB": "v", "RB": "r"}


@cache
def nltk() -> Any:
    """The package, with WordNet, the tokenizer and the tagger at hand. UserError if one of them is missing."""
    found = optional_module("nltk", "WUPS", "nltk")
    try:
        found.pos_tag(found.word_tokenize("two words"))
        found.corpus.wordnet.synsets("word")
    except LookupError as error:
        raise UserError(
            "WUPS needs data of nltk, which are not here: "
            "python -m nltk.downloader wordnet punkt_tab averaged_perceptron_tagger_eng"
        ) from error
    return found


@lru_cache(maxsize=1 << 16)
def content_words(text: str) -> str:
    """The words of a text in their base form, joined by spaces, without those that say little."""
    words = [_base_form(word.lower(), tag) for word, tag in nltk().pos_tag(nltk().word_tokenize(text))]
    return " ".join(word for word in words if word not in IGNORED)


def _base_form(word: str, tag: str) -> str:
    """The lemma if WordNet knows it, else the stem if WordNet knows that, else the word."""
    part = _PARTS.get(tag[:2]) or _PARTS.get(nltk().pos_tag([word])[0][1][:2], "n")
    forms = nltk().WordNetLemmatizer().lemmatize(word, part), nltk().PorterStemmer().stem(word)
    return next((form for form in forms if nltk().corpus.wordnet.synsets(form)), word)


def wups_score(text: str, reference: str, threshold: float) -> float:
    """Between 0 and 1, of two texts of `content_words`: the smaller of both directions. In each, every word counts with
    the similarity of the most similar word of the other text, and these are multiplied; words like no other are left
    out, and similarities below the threshold count a tenth."""
    one, other = (nltk().word_tokenize(words) for words in (text, reference))
    return min(_in_one_direction(one, other, threshold), _in_one_direction(other, one, threshold))


def _in_one_direction(words: Sequence[str], others: Sequence[str], threshold: float) -> float:
    best = [max((_similarity(word, other, threshold) for other in others), default=0.0) for word in words]
    return math.prod(score for score in best if score) if any(best) else 0.0


@lru_cache(maxsize=1 << 16)
def _similarity(one: str, other: str, threshold: float) -> float:
    """Wu and Palmer's similarity of the words' first meanings."""
    if one == other:
        return 1.0
    first, second = (nltk().corpus.wordnet.synsets(word)[:1] for word in (one, other))
    score = (first[0].wup_similarity(second[0]) or 0.0) if first and second else 0.0
    return score if score >= threshold else 0.1 * score
