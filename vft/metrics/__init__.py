"""Scores of predictions against references. Each function says its range and where its definition comes from.

`..._scores` gives a list, one score a prediction; `..._interval` a mean or corpus score with its confidence interval.
"""

from vft.common.scores import Interval, Parts, Samples, clusters_of
from vft.metrics.answers import anls_scores, segment_coverage_scores, token_f1_scores
from vft.metrics.bootstrap import (
    bleu4_interval,
    class_mean_interval,
    mean_interval,
    paired_difference,
    parts_from_json,
    parts_to_json,
    ratio_interval,
    rouge_l_interval,
)
from vft.metrics.choice import accuracy_by_class, breakdown, confusion, extract_letter, official_letter, top_k
from vft.metrics.cider import cider_d_scores, cider_d_text_scores
from vft.metrics.text import bleu4, distinct_n, exact_match_scores, is_right_option, rouge_l_scores
from vft.metrics.words import Japanese, RougeL, bleu_tokenizer, script_words, tokenize, word_tokenizer
