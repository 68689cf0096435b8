"""What the metrics share: words of a text, predictions and references that fit together, packages that are missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from vft.types import UserError


def tokenize(text: str) -> list[str]:
    """Words of `text`: lower case, apostrophes dropped (`it's` -> `its`), other punctuation a space, then split.

    No PTB tokenizer. Scripts that write no spaces come out as one word a clause.
    """
    return re.sub(r"[^\w\s]|_", " ", re.sub(r"['’]", "", text.lower())).split()


def count_ngrams(tokens: Sequence[str], sizes: Iterable[int]) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs, for every n of `sizes`."""
    return Counter(tuple(tokens[i : i + n]) for n in sizes for i in range(len(tokens) - n + 1))


def check_references(
    predictions: Sequence[object], references: Sequence[Sequence[object]], name: str = "references"
) -> None:
    """ValueError, with both numbers, unless there are predictions and each has one reference or more.

    `name` is what messages call the references.
    """
    if not predictions:
        raise ValueError("no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions, but {name} for {len(references)}")
    for i, refs in enumerate(references):
        if isinstance(refs, str):  # A string is a sequence too, of letters.
            raise ValueError(f"{name} of prediction {i}: a list of texts is needed, not one text")
        if not refs:
            raise ValueError(f"prediction {i} has 0 {name}, needs at least 1")


def missing_package(metric: str, package: str) -> UserError:
    """The error to raise where `metric` is asked for and `package`, of the extra `eval`, can't be imported."""
    return UserError(f"{metric} needs {package}, which is not installed: pip install 'vft[eval]'")
