"""Scores of captions as papers give them: those of COCO's caption evaluation, by the package pycocoevalcap.

Words are those of the Java program that it runs (Stanford's PTB tokenizer, lower case, without punctuation), so figures
compare with published ones; CIDEr, BLEU and ROUGE-L of the other modules have words and constants of their own. METEOR
is version 1.5 for English, a Java program too; nltk's figure of that name is another one.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vft.common.errors import UserError
from vft.common.scores import Interval, Samples
from vft.metrics.bootstrap import KINDS, class_mean_interval, mean_interval, table_interval
from vft.metrics.words import checked_pairs, optional_module

Words = Mapping[int, list[str]]
"""By the number of a sample, texts as words with a space between them."""


def coco_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    samples: Samples | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Interval]:
    """`cider_coco` (0 to 10; CIDEr-D, which pycocoevalcap calls CIDEr), `bleu4_coco` (0 to 100; of the whole corpus),
    `rouge_l_coco` (0 to 1; beta 1.2) and `meteor` (0 to 1; of the whole corpus), each with its interval.

    With `groups`, one for each prediction, `cider_coco_grouped` too: CIDEr within each group, averaged over the groups.
    CIDEr of a single sample is left out: it is always 0.

    Raises UserError without the extra `papers` or Java, or where Java fails; ValueError where a prediction has no
    reference.
    """
    pairs = checked_pairs(predictions, references)
    try:
        return _scores([refs for _, refs in pairs], [text for text, _ in pairs], samples, groups)
    except OSError as error:  # a broken pipe of a Java program that died, too
        raise UserError(
            f"COCO's evaluation of captions fails ({error}): Java needs 2 GB of memory, and pycocoevalcap a folder of "
            "its own that it may write to"
        ) from error


def _scores(
    references: Sequence[Sequence[str]],
    predictions: Sequence[str],
    samples: Samples | None,
    groups: Sequence[str] | None,
) -> dict[str, Interval]:
    right, said = _tokenized(references), _tokenized([[text] for text in predictions])
    scores = {}
    if len(predictions) > 1:
        scores["cider_coco"] = mean_interval(_cider(right, said), samples)
    if groups is not None:
        members = {group: [i for i, own in enumerate(groups) if own == group] for group in groups}
        by_sample: dict[int, float] = {}
        for own in members.values():
            by_sample |= zip(own, _cider({i: right[i] for i in own}, {i: said[i] for i in own}), strict=True)
        scores["cider_coco_grouped"] = class_mean_interval([by_sample[i] for i in right], groups, samples)
    rouge = _module("rouge.rouge").Rouge()
    scores["bleu4_coco"] = table_interval("coco bleu", [_bleu_counts(said[i][0], right[i]) for i in right], samples)
    scores["rouge_l_coco"] = mean_interval([float(rouge.calc_score(said[i], right[i])) for i in right], samples)
    scores["meteor"] = table_interval("meteor", _meteor_counts(right, said), samples)
    return {name: score.cut_by(["PTB"]) for name, score in scores.items()}


def meteor_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """METEOR 1.5 of each text by itself, 0 to 1. Raises as `coco_scores`."""
    pairs = checked_pairs(predictions, references)
    counts = _meteor_counts(_tokenized([refs for _, refs in pairs]), _tokenized([[text] for text, _ in pairs]))
    return [float(KINDS["meteor"](np.asarray([row]), np.ones((1, 1)))[0]) for row in counts]


def _module(name: str) -> Any:
    return optional_module(f"pycocoevalcap.{name}", "COCO's evaluation of captions", "pycocoevalcap", "papers")


def _tokenized(texts: Sequence[Sequence[str]]) -> Words:
    tokenizer = _module("tokenizer.ptbtokenizer").PTBTokenizer()
    if shutil.which("java") is None:
        raise UserError("COCO's evaluation of captions needs Java, which is not there: apt-get install default-jre")
    # The program takes a text a line: a break within one would move all that follow to other samples.
    lines = {i: [{"caption": " ".join(text.split())} for text in own] for i, own in enumerate(texts)}
    found: dict[int, list[str]] = tokenizer.tokenize(lines)
    if [len(found.get(i, ())) for i in lines] != list(map(len, lines.values())):
        raise UserError("pycocoevalcap's tokenizer gave no words: does `java -version` work, and is there memory?")
    return found


def _cider(right: Words, said: Words) -> list[float]:
    return [float(score) for score in _module("cider.cider").Cider().compute_score(right, said)[1]]


def _bleu_counts(text: str, refs: Sequence[str]) -> list[float]:
    """Right and all n-grams, 1 to 4, the length, and that of the reference nearest to it."""
    bleu = _module("bleu.bleu_scorer")
    counts = bleu.cook_test(text, bleu.cook_refs(refs), eff="closest")
    return [*counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]]


def _meteor_counts(right: Words, said: Words) -> list[list[float]]:
    """What METEOR counts for each sample with its best reference: lengths and function words of both, matches of each
    kind (content and function words, of both), chunks (none where all is matched in one), matches of both."""
    meteor = _module("meteor.meteor").Meteor()
    rows = [[float(count) for count in meteor._stat(said[i][0], right[i]).split()] for i in right]
    if any(len(row) != 23 for row in rows):
        raise UserError("METEOR gave no counts: does `java -version` work, and are there 2 GB of memory?")
    return [[*row[:20], 0.0 if row[20:] == [1.0, *row[:2]] else row[20], *row[21:]] for row in rows]
