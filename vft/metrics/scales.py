"""What a score can be, and which way is better. A task of your own may have scores that are not here."""

from __future__ import annotations

UP, DOWN = "higher is better", "lower is better"
SHARE, SHARE_OF_FAILURES = f"0 to 1, {UP}", f"0 to 1, {DOWN}"
CIDER, BLEU = f"0 to 10, {UP}", f"0 to 100, {UP}"

SCALES = {
    "loss": f"from 0, {DOWN}",
    **dict.fromkeys(("cider_d", "cider_coco", "cider_coco_grouped", "dense_cider_d"), CIDER),
    **dict.fromkeys(("bleu4", "bleu4_coco"), BLEU),
    **dict.fromkeys(("rouge_l", "rouge_l_coco", "meteor", "coverage"), SHARE),
    "distinct_2": "0 to 1, low if texts are alike",
    **dict.fromkeys(("top1", "top5", "top1_norm", "top5_norm", "mean_per_class", "exact_match"), SHARE),
    **dict.fromkeys(("accuracy", "accuracy_norm", "likelihood_accuracy", "choice_accuracy"), SHARE),
    **dict.fromkeys(("choice_accuracy_norm", "choice_accuracy_generated", "choice_accuracy_official"), SHARE),
    **dict.fromkeys(("choice_with_letter", "open_exact_match", "open_token_f1", "open_anls"), SHARE),
    **dict.fromkeys(("miou", "r1@0.3", "r1@0.5", "r1@0.7", "map", "soda_d", "soda_c", "wups_0.0", "wups_0.9"), SHARE),
    **dict.fromkeys(("no_time", "no_letter"), SHARE_OF_FAILURES),
    **dict.fromkeys(("likelier_chosen", "reward_accuracy"), SHARE),
    "reward_margin": f"any number, {UP}",
    "answered": "questions",
    **dict.fromkeys(("unreadable", "cut_off"), f"questions, {DOWN}"),
}
"""By the name of the score; that of a group (`accuracy/KEY/VALUE`) has the scale of its first part."""


def scale_of(name: str) -> str:
    """The range of a score and its better end, in words; empty if it is not known."""
    return SCALES.get(name.partition("/")[0], "")
