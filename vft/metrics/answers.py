"""Scores of short answers against right ones, and of long answers against what they should mention; one a prediction.

Edit distance and ROUGE-L come from rapidfuzz and rouge-score (extra `eval`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from vft.metrics.words import Japanese, RougeL, check_references, missing_package, split_word, squad_text


def anls_scores(predictions: Sequence[str], references: Sequence[Sequence[str]], threshold: float = 0.5) -> list[float]:
    """Average Normalized Levenshtein Similarity: its term for each prediction, 0 or `threshold` to 1.

    1 less the edits from prediction to reference as a share of the longer one's characters (composed, NFC); case and
    space around the text aside, best over the references, 0 below `threshold`. Source: Biten et al., "Scene Text Visual
    Question Answering", ICCV 2019. A similarity of exactly `threshold` counts, as evaluation scripts have it; the
    paper's equation makes it 0. Raises UserError without the extra `eval`, ValueError where a prediction has no
    reference.
    """
    check_references(predictions, references)
    assert 0 <= threshold <= 1, threshold
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise missing_package("ANLS", "rapidfuzz") from error
    scores = []
    for text, refs in zip(predictions, references, strict=True):
        said, *wanted = (unicodedata.normalize("NFC", one).strip().lower() for one in (text, *refs))
        best = max(Levenshtein.normalized_similarity(said, ref) for ref in wanted)
        scores.append(best if best >= threshold else 0.0)
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
    check_references(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return [max(_f1(_squad_words(text, japanese), _squad_words(ref, japanese)) for ref in refs) for text, refs in pairs]


def segment_coverage_scores(
    predictions: Sequence[str], segments: Sequence[Sequence[str]], threshold: float = 0.3
) -> list[float]:
    """Share of the reference segments, 0 to 1, that each prediction mentions.

    A segment is mentioned if a sentence of the prediction holds at least `threshold` of its words in order: recall of
    ROUGE-L, words as in `rouge_l_scores`. Nothing is subtracted for
    what a prediction says besides, so a longer one scores no lower. A measure of this project's own, without
    a published counterpart. Raises UserError without the extra `eval`, ValueError where a prediction has no segment.
    """
    check_references(predictions, segments, "segments")
    assert 0 < threshold <= 1, threshold
    scorer = RougeL()
    scores = []
    for text, wanted in zip(predictions, segments, strict=True):
        sentences = _split_sentences(text)
        mentioned = [
            any(scorer.score(segment, sentence).recall >= threshold for sentence in sentences) for segment in wanted
        ]
        scores.append(sum(mentioned) / len(mentioned))
    return scores


def _squad_words(text: str, japanese: Japanese) -> Counter[str]:
    words = re.sub(r"\b(a|an|the)\b", " ", squad_text(text)).split()
    return Counter(part for word in words for part in split_word(word, japanese))


def _f1(said: Counter[str], wanted: Counter[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    # Twice the shared words over all words is the harmonic mean of precision and recall.
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


def _split_sentences(text: str) -> list[str]:
    """Parts of `text` that end with `.`, `!` or `?` before space, with another script's mark, or with a line;
    abbreviations end one too."""
    return [part for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？｡।॥۔؟།၊။។])|\n+", text) if part.strip()]
