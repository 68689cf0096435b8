"""Multiple choice: which option an answer names, how good the choices are, and for which samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean

_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    "Answer:",
    "Option:",
    "The correct answer",
    "The correct option",
)
"""Removed in this order, wherever they stand; some hold capital letters that would be taken for the option."""


def extract_letter(text: str, letters: str = "ABCD") -> str | None:
    """The option that an answer names: the first character that is one of `letters`, or None.

    Phrases that announce an answer are removed first. Source: Fu et al., "Video-MME", 2024, the official evaluation
    script. As there, a letter within a word counts (`All of them` is A), and an answer of more than ten words without
    any of the letters is none, which follows from the rest. Unlike there, `The best option is`, `The correct option
    is`, `Best answer:` and `Best option:` are removed too: the script lists them, but two commas are missing in it, so
    that it takes `Best answer: C` for B.
    """
    assert letters
    for prefix in _PREFIXES:
        text = text.replace(prefix, "")
    return next((character for character in text if character in letters), None)


def top_k(option_scores: Sequence[float], right: Collection[int], k: int) -> bool:
    """Whether one of the options at the indices `right` is among the `k` that score highest.

    A wrong option that scores the same as a right one, or isn't comparable with it (NaN), counts as ahead of it: a
    model that gives all options one score gains nothing. True for `k` from the number of options on.
    """
    assert k > 0 and right and all(0 <= i < len(option_scores) for i in right), (k, right, len(option_scores))
    wrong = [score for i, score in enumerate(option_scores) if i not in right]
    return any(sum(not other < option_scores[i] for other in wrong) < k for i in right)


def accuracy_by_class(correct: Sequence[float], classes: Sequence[str]) -> dict[str, float]:
    """Mean of `correct`, 0 to 1, over the samples of each class, in sorted order.

    Raises ValueError for different numbers of both.
    """
    members = _gather(correct, [[(name,)] for name in classes], "classes")
    return {name: fmean(values) for (name,), values in members.items()}


def confusion(chosen: Sequence[str | None], right: Sequence[str]) -> dict[tuple[str, str], int]:
    """How often each pair of (chosen, right) occurs, in sorted order; an answer that is None counts as "".

    Raises ValueError for different numbers of both.
    """
    if len(chosen) != len(right):
        raise ValueError(f"{len(chosen)} choices, but {len(right)} right ones")
    return dict(sorted(Counter(("" if c is None else c, r) for c, r in zip(chosen, right, strict=True)).items()))


def breakdown(correct: Sequence[float], groups: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Mean of `correct` over the samples of each group, named `key/value`, sorted by key, then value.

    `groups` holds a sample's value for each key (`{"duration": "short"}`); where it lacks a key, the sample counts for
    none of its values. Raises ValueError for different numbers of both, and where two groups get one name.
    """
    means: dict[str, float] = {}
    for (key, value), members in _gather(correct, [sample.items() for sample in groups], "groups").items():
        name = f"{key}/{value}"
        if name in means:
            raise ValueError(f"two groups are called {name!r}; a key must not hold a slash")
        means[name] = fmean(members)
    return means


def _gather(
    correct: Sequence[float], groups: Sequence[Iterable[tuple[str, ...]]], name: str
) -> dict[tuple[str, ...], list[float]]:
    """The values of `correct` in each group, sorted by group; `groups` holds those that each sample is in."""
    if len(correct) != len(groups):
        raise ValueError(f"{len(correct)} scores, but {name} for {len(groups)}")
    members: dict[tuple[str, ...], list[float]] = {}
    for score, sample in zip(correct, groups, strict=True):
        for group in sample:
            members.setdefault(group, []).append(float(score))
    return dict(sorted(members.items()))
