"""What an answer says, by MMMU's rules (Yue et al. 2024, `eval/eval_utils.py`), as lmms-eval has them.

Several benchmarks use them. MMMU draws an option at random where an answer names none; here that is None.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase

_FORMS = ("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")
"""How a letter may stand in an answer, the first form that occurs counts; with each the form by which the last of
several letters is found."""
_INDICATORS = (
    *("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ", "are ", "in total ", "total "),
    *("identify ", "recognize ", "calculated as ", "counted as ", "measured as ", "observed as ", "concluded as "),
    *("found to be ", "equals ", "determined to be ", "number of ", "value is ", "adds up to ", "have ", "has "),
)
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def mmmu_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of one of the options (their texts) that an answer names: in the first form that occurs, else, in an
    answer of more than five words, by its text. Of several it is the last. None if there is none."""
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text, letters = f" {text} ", ascii_uppercase[: len(options)]
    for form, place in _FORMS:
        if found := [letter for letter in letters if form.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    places = {letter: text.lower().rfind(option.lower()) for letter, option in zip(letters, options, strict=True)}
    if len(text.split()) > 5 and max(places.values(), default=-1) >= 0:
        return max(places, key=places.__getitem__)
    return None


def mmmu_is_right(text: str, answer: str) -> bool:
    """Whether an open answer holds the right one: as a number to two decimals, or as words within one of its key
    phrases, which are what follows words such as `is`."""
    phrases = _key_phrases(text.strip().strip(".").lower())
    said = {part for phrase in phrases for part in (phrase, *_numbers(phrase))}
    forms = {form for part in said for form in _forms(part)}
    right = _forms(answer)
    return any(
        one in form if isinstance(one, str) and isinstance(form, str) else one == form
        for one in right
        for form in forms
    )


def _key_phrases(text: str) -> list[str]:
    """Of each line the shortest end that follows an indicator, in the last line also `=`; the text if there is none."""
    lines = text.split("\n")
    found = []
    for i, line in enumerate(lines):
        phrase = ""
        for indicator in (*_INDICATORS, *["="] * (i == len(lines) - 1)):
            end = line.rpartition(indicator)[2].strip()
            if indicator in line and (not phrase or len(end) < len(phrase)):
                phrase = end
        found += [phrase] if phrase and phrase not in tuple(":,.!?;'") else []
    return found or [text]


def _numbers(text: str) -> list[str]:
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def _forms(text: str) -> list[str | float]:
    """The number that a text is, to two decimals, or the text in lower case; one character has a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
