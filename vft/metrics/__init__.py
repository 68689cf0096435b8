"""Scores of predictions against references. Each function says its range and where its definition comes from.

`..._scores` gives a list, one score a prediction; `..._interval` a mean or corpus score with its confidence interval.
"""

from vft.metrics.bootstrap import (
    bleu4_interval,
    cider_d_interval,
    class_mean_interval,
    mean_interval,
    paired_difference,
    parts_from_json,
    parts_to_json,
    ratio_interval,
    rouge_l_interval,
    sample_values,
)
from vft.metrics.choice import breakdown, extract_letter, lmms_letter, official_letter, top_k
from vft.metrics.coco import coco_scores
from vft.metrics.scales import scale_of
from vft.metrics.text import (
    anls_scores,
    cider_d_scores,
    distinct_n,
    exact_match_scores,
    is_right_option,
    rouge_l_scores,
    segment_coverage_scores,
    token_f1_scores,
)
from vft.metrics.text import cider_d_scores as cider_d_text_scores  # its earlier name
from vft.metrics.words import Japanese, rouge_l_tokenizer, tokenize, word_tokenizer
