"""Charts: what a reader of the picture could not tell apart otherwise. `runs/test_report.py` reads where values lie."""

from __future__ import annotations

import itertools
import re

from vft.common.scores import Interval
from vft.reporting.page import TEMPLATES, line_chart, value_axis


def test_curves_that_lie_on_each_other_are_all_seen() -> None:
    """Each is narrower than those drawn before it, its dots are smaller, and its dashes are its own."""
    curve = [(step, Interval.point(1.0 / step)) for step in (1, 2, 3)]
    chart = line_chart("loss", dict.fromkeys("abcdef", curve))
    groups = re.findall(r'<g class="s(\d)" style="--width: ([\d.]+)px">(.*?)</g>', chart, re.DOTALL)
    widths, radii = ([float(w) for _, w, _ in groups], [float(re.findall(r' r="([\d.]+)"', g)[0]) for *_, g in groups])
    assert [number for number, *_ in groups] == list("012345")
    assert all(a - b > 0.9 for values in (widths, radii) for a, b in itertools.pairwise(values))
    style = TEMPLATES.get_template("parts.css").render()
    dashes = [re.findall(rf"\.s{number} .*--dash: ([^}}]*) }}", style)[0] for number in range(6)]
    assert len(set(dashes)) == 6


def test_an_axis_ends_where_its_scale_does() -> None:
    assert value_axis([0.2, 100.00000000000003]).ticks == (0, 50, 100)
    assert value_axis([0.2, 100.1]).ticks == (0, 50, 100, 150)
