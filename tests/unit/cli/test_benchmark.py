"""The table of `vft benchmark`: which score stands for a benchmark, and in what units."""

from __future__ import annotations

from vft import benchmarks
from vft.cli.benchmark import markdown, summary
from vft.common.scores import Interval
from vft.reporting.report import COUNTS

COUNTED = {name: Interval.point(0) for name in COUNTS}


def test_the_figure_that_could_be_computed() -> None:
    """Of captions without Java another CIDEr, under its own name; of what a judge scores none."""
    asked = {name: benchmarks.find(name) for name in ("msrvtt", "msvd", "videochatgpt")}
    one, other = Interval.point(0.5), Interval.point(0.75)
    found = {
        "msrvtt": {"base": {"cider_coco": one, "cider_d": other, **COUNTED}},
        "msvd": {"base": {"cider_d": other, **COUNTED}},
        "videochatgpt": {"base": dict(COUNTED)},
    }
    columns, rows = summary(asked, found)
    assert columns[:3] == ["benchmark", "figure", "base"]
    assert [row[:3] for row in rows] == [
        ["MSR-VTT", "cider_coco", "50"],
        ["MSVD", "cider_d", "75"],
        ["VideoChatGPT", "by a judge", ""],
    ]
    assert "| MSVD | cider_d | 75 |" in markdown(asked, found)
