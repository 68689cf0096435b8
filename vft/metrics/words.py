"""What the metrics share: words of a text, predictions and references that fit together, packages that are missing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from vft.types import UserError

_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, kana and ideographs, which are written without spaces between words."""


def tokenize(text: str) -> list[str]:
    """Words of `text`: lower case, apostrophes dropped (`it's` -> `its`), other punctuation a space, then split.

    No PTB tokenizer. Scripts that write no spaces come out as one word a clause.
    """
    return re.sub(r"[^\w\s]|_", " ", re.sub(r"['’]", "", text.lower())).split()


def script_words(text: str) -> list[str]:
    """Words of `text` in any script: as `tokenize` has them, but ideographs, kana and Thai letters one by one."""
    return re.findall(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+", " ".join(tokenize(text)))


def is_latin(texts: Iterable[str]) -> bool:
    """Whether most letters of `texts` are of the Latin script; true of texts without any."""
    letters = [character for text in texts for character in text if character.isalpha()]
    return sum(character < "\u0250" for character in letters) * 2 >= len(letters)


def rouge_l_scorer(references: Iterable[str]) -> Any:
    """rouge-score's scorer of ROUGE-L, without stemming, with words as the references' script has them.

    Raises UserError without the extra `eval`.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_package("ROUGE-L", "rouge-score") from error
    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=None if is_latin(references) else _ScriptWords())


class _ScriptWords:
    """What rouge-score takes for a tokenizer."""

    tokenize = staticmethod(script_words)


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
