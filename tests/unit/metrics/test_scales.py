"""Scores besides those of tasks have a scale too; `unit/recipes/test_tasks.py` holds the tasks' own to theirs."""

from __future__ import annotations

from vft import benchmarks
from vft.metrics import scale_of
from vft.preparation.documents import PAIR_SCORES
from vft.reporting.report import COUNTS


def test_every_score_has_a_scale() -> None:
    known = {benchmarks.find(name).main_metric for name in benchmarks.names()} - {"by a judge"}
    assert len(known) > 3 and all(map(scale_of, (*known, *PAIR_SCORES, *COUNTS, "loss")))
    assert scale_of("loss/source/clips") == scale_of("loss") == "from 0, lower is better"
    assert scale_of("my_own_score") == ""
