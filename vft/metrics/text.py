"""Scores of generated text against references, over a whole set.

BLEU and ROUGE-L come from sacrebleu and rouge-score (extra `eval`), so that figures compare with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from vft.metrics.words import check_references, count_ngrams, missing_package, rouge_l_scorer, tokenize


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of n-grams up to 4, 0 to 100, as sacrebleu computes it by default.

    Case counts, the tokenizer is `13a`, smoothing is exponential. Predictions may have different numbers of
    references. Raises UserError without the extra `eval`, ValueError where a prediction has no reference.
    """
    check_references(predictions, references)
    try:
        import sacrebleu
    except ImportError as error:
        raise missing_package("BLEU", "sacrebleu") from error
    # sacrebleu wants the first references of all, then the second ones, with None where there is none.
    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)  # type: ignore[arg-type]  # None is allowed


def rouge_l_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F-measure of the longest common subsequence of words, 0 to 1, as rouge-score computes it without stemming.

    Recall and precision weigh the same (beta 1; COCO's ROUGE_L has beta 1.2). Of several references the best one
    counts. Words are what rouge-score takes for words, runs of the letters a-z and digits; where references are in
    another script than the Latin one, `script_words`. Raises UserError without the extra `eval`, ValueError where a
    prediction has no reference.
    """
    check_references(predictions, references)
    scorer = rouge_l_scorer([ref for refs in references for ref in refs])
    pairs = zip(predictions, references, strict=True)
    return [float(scorer.score_multi(list(refs), text)["rougeL"].fmeasure) for text, refs in pairs]


def exact_match_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 for each prediction that equals a reference in its words (case and punctuation aside), else 0.

    Raises ValueError where a prediction has no reference.
    """
    check_references(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return [float(tokenize(text) in [tokenize(ref) for ref in refs]) for text, refs in pairs]


def distinct_n(predictions: Sequence[str], n: int) -> float:
    """Different n-grams as a share of all n-grams in all predictions together, 0 to 1 (Li et al., NAACL 2016).

    Low where a model repeats itself. 0 where no prediction has n words.
    """
    assert n > 0, n
    counts = sum((count_ngrams(tokenize(text), [n]) for text in predictions), start=count_ngrams([], [n]))
    return len(counts) / counts.total() if counts else 0.0
