"""Scores of predictions against references. Each function says its range and where its definition comes from."""

from vft.metrics.cider import cider_d, cider_d_scores
from vft.metrics.text import bleu4, distinct_n, exact_match, rouge_l
from vft.metrics.words import tokenize

__all__ = ["bleu4", "cider_d", "cider_d_scores", "distinct_n", "exact_match", "rouge_l", "tokenize"]
