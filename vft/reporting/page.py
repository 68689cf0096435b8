"""Pages from the jinja templates beside this file, and the charts in them: curves over steps as SVG elements.

A chart has round numbers on its axes and a tooltip on every point. `parts.css` sets colours, dashes and fonts by class:
`s0` to `s5` for the series, `grid`, `tick`, `whisker`. A curve is narrower than those drawn before it, so that all are
seen where they lie on each other.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from vft.common.scores import Interval

Curve = Sequence[tuple[int, Interval]]
"""Values by step, in order. A value without an interval has low = high."""

WIDTH, HEIGHT = 420, 210
"""Size of the drawing in its own units; the page scales it."""
TOP, RIGHT, BOTTOM = 10, 14, 24


def _sha256(text: str) -> str:
    """Names a script in a Content-Security-Policy, so that it may run and no other."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["sha256"] = _sha256
MAX_POINTS = 300
"""A longer curve is drawn as the means of this many parts."""
MAX_DOTS = 40
"""A curve with at most this many points shows each as a dot."""
LINE_WIDTH, WIDEST = 1.6, 6.6
"""Widths of the uppermost curve and of the lowest of many."""
LOG_FROM = 30
"""The axis is logarithmic if the largest value is more than this many times the median: a spike would hide the rest."""


def render(template: str, **values: Any) -> str:
    """Fill in the template of this name. In `.html` all values are escaped, unless the template marks one safe."""
    return TEMPLATES.get_template(template).render(**values)


@dataclass(frozen=True, slots=True)
class Axis:
    """A range and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float, begin: float, end: float) -> float:
        """The coordinate of `value` on an axis drawn from `begin` to `end`."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        return begin + ((math.log10(value) if self.log else value) - low) / (high - low) * (end - begin)


def line_chart(title: str, series: Mapping[str, Curve]) -> str:
    """The chart as an SVG element. At least one curve must have a point, and values must be finite."""
    parts = {name: _in_parts(curve) for name, curve in series.items()}
    everything = [part for curve in parts.values() for part in curve]
    # The range of a mean (least and largest value) is only in its tooltip: on the axis it would flatten the curve.
    y = value_axis(
        [v for a, b, mean in everything for v in ((mean.value, mean.low, mean.high) if a == b else (mean.value,))]
    )
    x = step_axis([last for _, last, _ in everything])
    left, right, foot = 12 + 6.2 * max(len(_label(tick)) for tick in y.ticks), WIDTH - RIGHT, HEIGHT - BOTTOM
    lines = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps">']
    for tick in y.ticks:
        at = y.place(tick, foot, TOP)
        lines.append(f'<line class="grid" x1="{left:.1f}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        lines.append(f'<text class="tick y" x="{left - 5:.1f}" y="{at:.1f}">{_label(tick)}</text>')
    for tick in x.ticks:
        at = x.place(tick, left, right)
        lines.append(f'<line class="grid" x1="{at:.1f}" y1="{foot}" x2="{at:.1f}" y2="{foot + 4}"/>')
        lines.append(f'<text class="tick x" x="{at:.1f}" y="{foot + 16}">{_label(tick)}</text>')
    for number, (name, curve) in enumerate(parts.items()):
        points, marks = [], []
        wider = min(1.8, (WIDEST - LINE_WIDTH) / max(1, len(parts) - 1)) * (len(parts) - 1 - number)
        for first, last, one in curve:
            px, py = x.place(last, left, right), y.place(one.value, foot, TOP)
            points.append(f"{px:.1f},{py:.1f}")
            when = f"step {last}" if first == last else f"mean of steps {first} to {last}"
            tooltip = f"{name}, {when}: {one.value:.5g}"
            if one.low < one.high:
                tooltip += f" [{one.low:.5g}, {one.high:.5g}]"
            if one.low < one.high and first == last:
                ends = f'y1="{y.place(one.low, foot, TOP):.1f}" y2="{y.place(one.high, foot, TOP):.1f}"'
                marks.append(f'<line class="whisker" x1="{px:.1f}" x2="{px:.1f}" {ends}/>')
            kind = "dot" if len(curve) <= MAX_DOTS else "dot hidden"
            place = f'cx="{px:.1f}" cy="{py:.1f}" r="{3 + wider:g}"'
            marks.append(f'<circle class="{kind}" {place}><title>{escape(tooltip)}</title></circle>')
        lines.append(f'<g class="s{number % 6}" style="--width: {LINE_WIDTH + wider:g}px">')
        lines.append(f'<polyline class="curve" points="{" ".join(points)}"/>{"".join(marks)}</g>')
    return "\n".join([*lines, "</svg>"])


def value_axis(values: Sequence[float]) -> Axis:
    """An axis from a round number below the values to one above them; logarithmic if one value is far above the
    rest."""
    low, high = min(values), max(values)
    if low > 0 and high > LOG_FROM * median(values):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        powers = range(first, last + 1, math.ceil((last - first) / 6))
        return Axis(10.0**first, 10.0**last, tuple(10.0**power for power in powers), log=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    step = _round_up((high - low) / 4)
    # A score of 100 may be 100.00000000000001.
    ticks = tuple(i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def step_axis(steps: Sequence[int]) -> Axis:
    """An axis from the first step to the last, with ticks at round numbers."""
    low, high = min(steps), max(steps)
    if low == high:
        return Axis(low - 1, high + 1, (low,))
    step = max(1, round(_round_up((high - low) / 6)))
    return Axis(low, high, tuple(range(math.ceil(low / step) * step, high + 1, step)))


def _round_up(rough: float) -> float:
    """The next larger number of 1, 2 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)


def _in_parts(curve: Curve) -> list[tuple[int, int, Interval]]:
    """First step, last step and value of each point that is drawn. Several steps give their mean, least and largest
    value."""
    size = max(1, math.ceil(len(curve) / MAX_POINTS))
    made = []
    for part in (curve[i : i + size] for i in range(0, len(curve), size)):
        values = [one.value for _, one in part]
        mean = part[0][1] if size == 1 else Interval(fmean(values), min(values), max(values))
        made.append((part[0][0], part[-1][0], mean))
    return made


def _label(value: float) -> str:
    return f"{value:,.10g}"
