"""Multiple choice: which option an answer names, how good the choices are, and for which samples."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from vft.common.scores import Interval

_IN_WORD = r"A-Za-z\u00c0-\u024f\d_'’"
_BEFORE = rf"(?<![{_IN_WORD}.°])(?<![{_IN_WORD}]-)"
_BEHIND = rf"(?![{_IN_WORD}+#]|[.-]\w)"
"""Not within a word: `X-ray`, `U.S.`, `C++`, 5 °C."""
_WORD_BEHIND = (
    r"\s+(?!(?:is|and|or|but|not|as|because|since|for|which|that|with|in|on|from|by|than|if|so|given|based|due)\b)[a-z]"
)
"""Behind `I`, and behind `A` where a sentence begins: then they are a pronoun and an article."""
_CAPITAL = rf"([B-HJ-Z]{_BEHIND}|(?:(?<=[a-z,;] )A|[AI](?!{_WORD_BEHIND})){_BEHIND})"
_AT_START = re.compile(r"\W*(?:([A-Z])\s*(?:[.):\]](?![A-Z])|$)|([a-z])\s*(?:[.):\]](?![A-Za-z])|$))", re.MULTILINE)
_ANNOUNCED = re.compile(
    r"(?i:\b(?:answer|(?:correct|best|right) (?:option|choice)|(?:option|choice)(?= is\b|:))\W*"
    r"(?:(?:is|was|would be|must be|should be)\b\W*)?(?:(?:option|choice|letter)\b\W*)?)"
    rf"(?:{_CAPITAL}|([a-z])(?=\s*(?:[.):\]](?![A-Za-z])|$)))",
    re.MULTILINE,
)
_ALONE = re.compile(rf"{_BEFORE}(?:{_CAPITAL}|([a-z])(?=\s*(?:[):\]]|[.!]?\s*$)))", re.MULTILINE)
_LETTER = rf"\(?[A-Z]{_BEHIND}\)?"
_LETTERS = rf"{_LETTER}(?:(?:, {_LETTER}){{0,25}},? (?:and|or|nor) {_LETTER})?"
_DENIED = re.compile(
    rf"(?:\b(?i:not|cannot|neither)|n['’]t)\s+(?:be\s+)?(?:(?i:options?|choices?)\s+)?{_LETTERS}"
    rf"|{_BEFORE}{_LETTERS}\s+(?:(?:is|are|was|were)\s+(?:not|wrong|incorrect|false)|(?:is|are|was|were)n['’]t)\b"
)
_QUOTED = re.compile(r"(?<!\w)['‘’]([A-Za-z])['’](?!\w)")
_FULL_WIDTH = {code + 0xFEE0: code for code in range(0x21, 0x7F)}
_ARTICLE = re.compile(r"\W*(A)\s")

_OFFICIAL_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)
"""Removed in this order, wherever they stand. Two commas are missing in the script; they are missing here."""

_LMMS_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def extract_letter(text: str, letters: str = "ABCD") -> str | None:
    """The option that an answer names, one of `letters`, or None.

    In this order: a letter that opens the text (`C`, `(c)`, `C. red`, `A: red`), the last one that is announced (`The
    answer is I`), the first that stands alone (`It is C`). `A` and `I` before a word are an article and a pronoun,
    unless there is nothing but `A` at the start (`A red car`); within a sentence `A` is a letter. One of lower case
    counts where it ends the text or is in brackets or the like. Letters that are denied (`not A`, `A is wrong`),
    reasoning (`<think>`) and Markdown's marks are left out.
    """
    assert letters.isupper(), letters
    text = re.sub(r"[*_`$]|\\(?:boxed|text)\b", "", text.rpartition("</think>")[2].translate(_FULL_WIDTH))
    text = _DENIED.sub(" ", _QUOTED.sub(r"\1", text)).strip()
    opening, article = _AT_START.match(text), _ARTICLE.match(text)
    found = [opening[1] or opening[2]] if opening else []
    for pattern, order in ((_ANNOUNCED, -1), (_ALONE, 1)):
        found += [next(filter(None, match.groups())) for match in pattern.finditer(text)][::order]
    found += [article[1]] if article else []
    return next((letter for letter in map(str.upper, found) if letter in letters), None)


def official_letter(text: str, letters: str = "ABCD") -> str | None:
    """The option that Video-MME's official script takes an answer for: the first character that is one of `letters`.

    Phrases that announce an answer are removed first. A letter within a word counts (`All of them` is A, `Best answer:
    C` is B). Source: Fu et al., "Video-MME", 2024, `eval_your_results.py`.
    """
    for prefix in _OFFICIAL_PREFIXES:
        text = text.replace(prefix, "")
    return next((character for character in text if character in letters), None)


def lmms_letter(text: str, letters: str = "ABCD") -> str | None:
    """The option that lmms-eval takes an answer for: of the letters in its best form the last, else any letter in it.

    The forms, the best first: a letter that opens the text, one that ends it, the first of each after a phrase such as
    `the answer is`, `(A)`, `A.`, `A:`, `A)`, `A `. Source: lmms-eval, `tasks/_task_utils/mcq_extract.py`.
    """
    text = text.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    bare, text = text.strip(), f" {text} "
    forms = "{} ", "{})", "{}:", "{}.", "({})"
    written = [(rank, form.format(letter), letter) for rank, form in enumerate(forms) for letter in letters]
    found = [(rank, text.rfind(form), letter) for rank, form, letter in written if form in text]
    starts = [text.lower().find(phrase) + len(phrase) for phrase in _LMMS_PHRASES if phrase in text.lower()]
    found += [(5, place, letter) for start in starts for letter in letters if (place := text.find(letter, start)) >= 0]
    edges = (6, bare[:-3:-1]), (7, bare[:2])
    found += [(rank, 0, edge[0]) for rank, edge in edges if edge[:1] in tuple(letters) and not edge[1:].isalpha()]
    found = found or [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else None


def top_k(option_scores: Sequence[float], right: Collection[int], k: int) -> bool:
    """Whether one of the options at the indices `right` is among the `k` that score highest.

    A wrong option that scores the same as a right one, or isn't comparable with it (NaN), counts as ahead of it: a
    model that gives all options one score gains nothing. True for `k` from the number of options on.
    """
    assert k > 0 and right and all(0 <= i < len(option_scores) for i in right), (k, right, len(option_scores))
    wrong = [score for i, score in enumerate(option_scores) if i not in right]
    return any(sum(not other < option_scores[i] for other in wrong) < k for i in right)


def breakdown(correct: Sequence[float], groups: Sequence[Mapping[str, str]]) -> dict[str, Interval]:
    """Mean of `correct` over the samples of each group, named `key/value`, sorted by key, then value.

    `groups` holds a sample's value for each key (`{"duration": "short"}`); where it lacks a key, the sample counts for
    none of its values. Raises ValueError for different numbers of both, and where two groups get one name.
    """
    if len(correct) != len(groups):
        raise ValueError(f"{len(correct)} scores, but groups for {len(groups)}")
    members: dict[tuple[str, str], list[float]] = {}
    for score, own in zip(correct, groups, strict=True):
        for group in own.items():
            members.setdefault(group, []).append(score)
    means: dict[str, Interval] = {}
    for key, value in sorted(members):
        name = f"{key}/{value}"
        if name in means:
            raise ValueError(f"two groups are called {name!r}; a key must not hold a slash")
        means[name] = Interval.point(fmean(members[key, value]))
    return means
