"""What the metrics share: words of a text, and pairs of predictions and references that fit together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence


def tokenize(text: str) -> list[str]:
    """Words of `text`: lower case, apostrophes dropped (`it's` -> `its`), other punctuation a space, then split.

    No PTB tokenizer. Scripts that write no spaces come out as one word a clause.
    """
    return re.sub(r"[^\w\s]|_", " ", re.sub(r"['’]", "", text.lower())).split()


def count_ngrams(tokens: Sequence[str], sizes: Iterable[int]) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs, for every n of `sizes`."""
    return Counter(tuple(tokens[i : i + n]) for n in sizes for i in range(len(tokens) - n + 1))


def check_references(predictions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    """ValueError, with both numbers, unless there are predictions and each has one reference or more."""
    if not predictions:
        raise ValueError("no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but references for {len(references)}")
    for i, refs in enumerate(references):
        if isinstance(refs, str):  # A string is a sequence too, of letters.
            raise ValueError(f"references of prediction {i}: a list of texts is needed, not one text")
        if not refs:
            raise ValueError(f"prediction {i} has 0 references, needs at least 1")
