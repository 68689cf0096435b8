"""Scores of two evaluations side by side, with intervals, for the report, the model card and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vft.common.scores import Interval
from vft.metrics import paired_difference
from vft.reporting.run_folder import Scores

DIFFERENCE = "difference"
"""Name under which `vft evaluate` stores the difference of two models."""
COUNTS = ("answered", "unreadable", "cut_off")
"""Scores that count samples; they have no curves."""

Text = tuple[str, str]
"""A value and its interval, each as text; empty if there is none."""


def score_tables(evaluations: Mapping[str, Scores], made_by: str = "") -> list[dict[str, Any]]:
    """The first evaluation beside the last one: a table of the scores, and one of those of groups (`top1/LABEL`)."""
    models = [name for name in evaluations if name != DIFFERENCE]
    names = list(dict.fromkeys(models[:1] + models[-1:]))
    sides = [evaluations[name] for name in names]
    rows = []
    for metric in dict.fromkeys(metric for side in sides for metric in side):
        scores = [side.get(metric) for side in sides]
        difference = evaluations.get(DIFFERENCE, {}).get(metric)
        if len(sides) < 2:
            change = "", ""
        elif difference is None:
            change = change_text(*scores)
        else:
            change = score_text(difference, "+")
        cut = " / ".join(dict.fromkeys(one.tokenization for one in scores if one is not None and one.tokenization))
        rows.append({"metric": metric, "cut": cut, "scores": [score_text(one) for one in scores], "change": change})
    parts = {
        f"Scores{made_by}": [row for row in rows if "/" not in row["metric"]],
        f"Groups{made_by}": [row for row in rows if "/" in row["metric"]],
    }
    return [
        {
            "title": title,
            "names": names,
            "rows": part,
            "intervals": any(interval for row in part for _, interval in row["scores"]),
        }
        for title, part in parts.items()
        if part
    ]


def score_text(score: Interval | None, sign: str = "") -> Text:
    """A score and its interval; with `sign` = "+" both have their signs."""
    if score is None:
        return "", ""
    interval = f"[{score.low:{sign}.3g}, {score.high:{sign}.3g}]" if score.low < score.high else ""
    return f"{score.value:{sign}.4g}", interval


def change_text(before: Interval | None, after: Interval | None) -> Text:
    """The difference of two scores, with its interval if both are known sample by sample, on the same questions."""
    if before is None or after is None:
        return "", ""
    if before.tokenization and after.tokenization and before.tokenization != after.tokenization:
        return "", "texts cut in two ways"
    if before.parts is None or after.parts is None:
        return f"{after.value - before.value:+.4g}", ""
    paired = paired_difference(before, after)
    if paired is None:
        return "", "other questions"
    difference, num_common = paired
    value, interval = score_text(difference, "+")
    num_samples = max(len(before.parts.samples.names), len(after.parts.samples.names))
    return value, interval if num_common == num_samples else f"{interval} on the {num_common} of both".strip()
