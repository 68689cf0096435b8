"""Scores of generated text against references, over a whole set.

BLEU and ROUGE-L come from sacrebleu and rouge-score (extra `eval`), so that figures compare with published ones.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import regex

from vft.metrics.words import (
    Japanese,
    RougeL,
    bleu_tokenizer,
    characters,
    check_references,
    count_ngrams,
    mecab,
    missing_package,
    normalize,
    script_words,
)


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]], japanese: Japanese = "char") -> float:
    """Corpus BLEU of n-grams up to 4, 0 to 100, as sacrebleu computes it by default.

    Case counts, smoothing is exponential, texts are cut by `bleu_words`. Predictions may have different numbers of
    references. Raises UserError without the extra `eval`, ValueError where a prediction has no reference.
    """
    texts, wanted = bleu_words(predictions, references, japanese)
    from sacrebleu import BLEU

    # sacrebleu wants the first references of all, then the second ones, with None where there is none.
    most = max(map(len, wanted))
    streams = [[refs[i] if i < len(refs) else None for refs in wanted] for i in range(most)]
    return float(BLEU(tokenize="none", force=True).corpus_score(texts, streams).score)  # type: ignore[arg-type]  # None is allowed


def bleu_words(
    predictions: Sequence[str], references: Sequence[Sequence[str]], japanese: Japanese = "char"
) -> tuple[list[str], list[list[str]]]:
    """Predictions and references as sacrebleu cuts them, with spaces between words.

    Each prediction is cut as its references are: by sacrebleu's `13a`; Chinese by its `zh`; Japanese, Thai, Lao, Khmer
    and Burmese by characters with their marks (`char`, which cuts marks off and Latin words up too), or Japanese by
    its `ja-mecab`. Texts are composed (NFC) first.

    Raises UserError without the extra `eval`, or for `ja-mecab` without the extra `ja`; ValueError where a prediction
    has no reference.
    """
    check_references(predictions, references)
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise missing_package("BLEU", "sacrebleu") from error
    cut: dict[str, Callable[[str], str]] = {
        "13a": BLEU(tokenize="13a").tokenizer,
        "zh": BLEU(tokenize="zh").tokenizer,
        "char": lambda text: " ".join(characters(text)),
        "ja-mecab": lambda text: mecab()(text),
    }
    texts, wanted = [], []
    for text, refs in zip(predictions, references, strict=True):
        tokenizer = cut[bleu_tokenizer(refs, japanese)]
        first, *rest = (tokenizer(unicodedata.normalize("NFC", one).rstrip()) for one in (text, *refs))
        texts.append(first)
        wanted.append(rest)
    return texts, wanted


def rouge_l_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F-measure of the longest common subsequence of words, 0 to 1, as rouge-score computes it without stemming.

    Recall and precision weigh the same (beta 1; COCO's ROUGE_L has beta 1.2). Of several references the best one
    counts. Words are what rouge-score takes for words, runs of the letters a-z and digits; for a reference that isn't
    English, `script_words`. Raises UserError without the extra `eval`, ValueError where a prediction has no reference.
    """
    check_references(predictions, references)
    scorer = RougeL()
    pairs = zip(predictions, references, strict=True)
    return [max(float(scorer.score(ref, text).fmeasure) for ref in refs) for text, refs in pairs]


def exact_match_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 for each prediction that equals a reference in its words (case and punctuation aside), else 0.

    Symbols without words (`→`) equal themselves alone. Raises ValueError where a prediction has no reference.
    """
    check_references(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return [float(_compared(text) in map(_compared, refs)) for text, refs in pairs]


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


def distinct_n(predictions: Sequence[str], n: int) -> float:
    """Different n-grams as a share of all n-grams in all predictions together, 0 to 1 (Li et al., NAACL 2016).

    Low where a model repeats itself. 0 where no prediction has n words.
    """
    assert n > 0, n
    counts = sum((count_ngrams(script_words(text), [n]) for text in predictions), start=count_ngrams([], [n]))
    return len(counts) / counts.total() if counts else 0.0
