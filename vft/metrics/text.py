"""Scores of texts against references, most of them one for each prediction.

ROUGE-L and the edit distance come from rouge-score and rapidfuzz (extra `eval`), so that figures compare with published
ones.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import fmean

import regex

from vft.metrics.words import (
    Japanese,
    checked_pairs,
    normalize,
    optional_module,
    rouge_l_scorer,
    script_words,
    split_word,
    squad_text,
)

# ------------------------------------------------------------------------------------------- equal texts, shared words


def exact_match_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 for each prediction that equals a reference in its words (case and punctuation aside), else 0.

    Symbols without words (`→`) equal themselves alone. Raises ValueError where a prediction has no reference.
    """
    return [float(_compared(text) in map(_compared, refs)) for text, refs in checked_pairs(predictions, references)]


def is_right_option(text: str, right: Iterable[str], options: Iterable[str]) -> bool:
    """Whether `text` equals one of `right` as `exact_match_scores` has it, and no other one of `options` as much.

    Options may differ in no word (`A+`, `A-`): then case and punctuation tell which one is meant, or it is none.
    """
    same = {option for option in (*right, *options) if _compared(option) == _compared(text)}
    same_right = same.intersection(right)
    for form in (_as_written, normalize):
        meant = {option for option in same if form(_as_written(option)) == form(_as_written(text))}
        if meant:
            return meant <= same_right
    return bool(same and _compared(text)) and same <= same_right


@lru_cache(maxsize=1 << 14)
def _compared(text: str) -> tuple[str, ...]:
    """Words, or symbols where there are none: ASCII has none but those that are words."""
    return tuple(script_words(text) or regex.findall(r"[^\s\p{P}\p{ASCII}]", normalize(text)))


def _as_written(text: str) -> str:
    """Without white space around it and a full stop behind it."""
    return unicodedata.normalize("NFC", text).strip().removesuffix(".")


def anls_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Average Normalized Levenshtein Similarity: its term for each prediction, 0 or 0.5 to 1.

    1 less the edits from prediction to reference as a share of the longer one's characters (composed, NFC); case and
    space around the text aside, best over the references, 0 below 0.5. Source: Biten et al., "Scene Text Visual
    Question Answering", ICCV 2019. A similarity of exactly 0.5 counts, as evaluation scripts have it; the paper's
    equation makes it 0. Raises UserError without the extra `eval`, ValueError where a prediction has no reference.
    """
    levenshtein = optional_module("rapidfuzz.distance", "ANLS", "rapidfuzz").Levenshtein
    scores = []
    for text, refs in checked_pairs(predictions, references):
        prediction, *rights = (unicodedata.normalize("NFC", one).strip().lower() for one in (text, *refs))
        best = max(levenshtein.normalized_similarity(prediction, right) for right in rights)
        scores.append(best if best >= 0.5 else 0.0)
    return scores


def token_f1_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], japanese: Japanese = "char"
) -> list[float]:
    """F1 of the words that each prediction shares with a reference, 0 to 1; best over the references.

    Words as in SQuAD: lower case, ASCII punctuation dropped, then `a`, `an` and `the`, then split at spaces; order does
    not count. What `words.tokenize` keeps is kept here too (-5 is not 5), and scripts without spaces are split further
    as `words.script_words` does. Where prediction or reference has no words left, 1 if neither has any, else 0. Source:
    Rajpurkar et al., "SQuAD", EMNLP 2016, and the evaluation script of SQuAD 2.0. Raises ValueError where a prediction
    has no reference.
    """

    def words_of(text: str) -> Counter[str]:
        words = re.sub(r"\b(a|an|the)\b", " ", squad_text(text)).split()
        return Counter(part for word in words for part in split_word(word, japanese))

    pairs = checked_pairs(predictions, references)
    return [max(_f1(words_of(text), words_of(ref)) for ref in refs) for text, refs in pairs]


def _f1(prediction: Counter[str], reference: Counter[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    # Twice the shared words over all words is the harmonic mean of precision and recall.
    return 2 * (prediction & reference).total() / (prediction.total() + reference.total())


# --------------------------------------------------------------------------------------------------- longer texts


def rouge_l_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F-measure of the longest common subsequence of words, 0 to 1, as rouge-score computes it without stemming.

    Recall and precision weigh the same (beta 1; COCO's ROUGE_L has beta 1.2). Of several references the best one
    counts. Words are what rouge-score takes for words, runs of the letters a-z and digits; for a reference that isn't
    English, `script_words`. Raises UserError without the extra `eval`, ValueError where a prediction has no reference.
    """
    rouge_l, pairs = rouge_l_scorer(), checked_pairs(predictions, references)
    return [max(float(rouge_l(ref, text).fmeasure) for ref in refs) for text, refs in pairs]


def segment_coverage_scores(
    predictions: Sequence[str], segments: Sequence[Sequence[str]], threshold: float = 0.3
) -> list[float]:
    """Share of the reference segments, 0 to 1, that each prediction mentions.

    A segment is mentioned if a sentence of the prediction holds at least `threshold` of its words in order: recall of
    ROUGE-L, words as in `rouge_l_scores`. Nothing is subtracted for what a prediction says besides, so a longer one
    scores no lower. A measure of this project's own, without a published counterpart. Raises UserError without the
    extra `eval`, ValueError where a prediction has no segment.
    """
    rouge_l, scores = rouge_l_scorer(), []
    for text, parts in checked_pairs(predictions, segments, "segments"):
        sentences = [sentence for sentence in _SENTENCE_END.split(text) if sentence.strip()]
        found = [any(rouge_l(part, sentence).recall >= threshold for sentence in sentences) for part in parts]
        scores.append(sum(found) / len(found))
    return scores


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？｡।॥۔؟།၊။។])|\n+")
"""`.`, `!` or `?` before space, another script's mark, or a line's end; abbreviations end a sentence too."""


def distinct_n(predictions: Sequence[str], n: int) -> float:
    """Different n-grams as a share of all n-grams in all predictions together, 0 to 1 (Li et al., NAACL 2016).

    Low where a model repeats itself. 0 where no prediction has n words.
    """
    counts = sum((_count_ngrams(script_words(text), [n]) for text in predictions), start=_Counts())
    return len(counts) / counts.total() if counts else 0.0


# ------------------------------------------------------------------------------------------------------- CIDEr-D

_SIZES = (1, 2, 3, 4)
_SIGMA = 6.0
"""Words: standard deviation of the penalty on the difference in length."""

_Counts = Counter[tuple[str, ...]]


def cider_d_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], japanese: Japanese = "char"
) -> list[float]:
    """CIDEr-D of each prediction, 0 to 10: how far captions use the words that people use for the same video and not
    for others.

    Source: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015, equations 1-3
    and the CIDEr-D variant of its section on gaming (n-gram counts clipped, a Gaussian penalty on the difference in
    length). Constants as in the COCO evaluation server: n = 1..4, sigma = 6, times 10. No PTB tokenizer: texts are
    split by `words.script_words`, so figures differ somewhat from COCO's own, which run a Java program first. On the
    same words they are equal to pycocoevalcap's.

    The weight of an n-gram falls with the number of samples whose references hold it, so a score depends on the whole
    set, and is zero for any text in a set of one: ValueError for fewer than 2 samples, or where a prediction has no
    reference.
    """
    pairs = checked_pairs(predictions, references)
    if len(pairs) < 2:
        raise ValueError(
            "CIDEr-D of 1 sample is always 0, for it weighs words by how few other samples use them; needs at least 2"
        )
    texts = [[script_words(text, japanese) for text in (prediction, *refs)] for prediction, refs in pairs]
    all_counts = [[_count_ngrams(words, _SIZES) for words in words_of_texts] for words_of_texts in texts]
    holders = Counter(ngram for _, *refs_counts in all_counts for ngram in set().union(*refs_counts))
    log_num_samples = math.log(len(pairs))

    def weigh(counts: _Counts) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in _SIZES]
        for ngram, count in counts.items():
            # An n-gram that no reference holds counts as held by one (it still lengthens the prediction's vector).
            vectors[len(ngram) - 1][ngram] = count * (log_num_samples - math.log(holders[ngram] or 1))
        return vectors

    scores = []
    for (words, *refs), (counts, *refs_counts) in zip(texts, all_counts, strict=True):
        vectors = weigh(counts)
        similarities = [
            math.exp(-((len(words) - len(ref)) ** 2) / (2 * _SIGMA**2)) * fmean(map(_cosine, vectors, weigh(own)))
            for ref, own in zip(refs, refs_counts, strict=True)
        ]
        scores.append(10.0 * fmean(similarities))
    return scores


def _cosine(prediction: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Cosine of the angle between two vectors, the prediction's entries clipped to the reference's in the product."""
    norms = math.hypot(*prediction.values()) * math.hypot(*reference.values())
    if norms == 0.0:
        return 0.0
    # In the order of the words: a set's order, and with it the last digit, would change from run to run.
    return sum(min(value, reference[g]) * reference[g] for g, value in prediction.items() if g in reference) / norms


def _count_ngrams(tokens: Sequence[str], sizes: Iterable[int]) -> _Counts:
    """How often each run of n words occurs, for every n of `sizes`."""
    return Counter(tuple(tokens[i : i + n]) for n in sizes for i in range(len(tokens) - n + 1))
