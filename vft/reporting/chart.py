"""Curves over steps as SVG that stands alone: axes with round numbers, a title on every point.

Colours and fonts are the page's, by class: `s0` to `s5` for the series, `grid`, `tick`, `whisker`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean, median

from vft.common.scores import Interval

Curve = Sequence[tuple[int, Interval]]
"""Values by step, in order; low = high where a value has no interval."""

WIDTH, HEIGHT = 420, 210
"""Of the drawing, in its own units; the page scales it."""
TOP, RIGHT, BOTTOM = 10, 14, 24
MAX_POINTS = 300
"""A longer curve is drawn by the means of as many parts."""
MAX_DOTS = 40
"""A curve of at most so many points shows each as a dot."""
LOG_FROM = 30
"""How far the largest value may lie above the median before the axis is logarithmic: one spike hides all else."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A range and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float, begin: float, end: float) -> float:
        """Where `value` stands between the ends of the axis."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        return begin + ((math.log10(value) if self.log else value) - low) / (high - low) * (end - begin)


def line_chart(title: str, series: Mapping[str, Curve]) -> str:
    """An SVG element. At least one curve must have a point; values must be finite."""
    parts = {name: _in_parts(curve) for name, curve in series.items()}
    everything = [part for curve in parts.values() for part in curve]
    # Of a mean's range, which is its parts' extremes, the title tells; it would press the curve flat.
    y = value_axis(
        [v for a, b, one in everything for v in ((one.value, one.low, one.high) if a == b else (one.value,))]
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
        for first, last, one in curve:
            px, py = x.place(last, left, right), y.place(one.value, foot, TOP)
            points.append(f"{px:.1f},{py:.1f}")
            when = f"step {last}" if first == last else f"mean of steps {first} to {last}"
            told = f"{name}, {when}: {one.value:.5g}"
            if one.low < one.high:
                told += f" [{one.low:.5g}, {one.high:.5g}]"
            if one.low < one.high and first == last:
                ends = f'y1="{y.place(one.low, foot, TOP):.1f}" y2="{y.place(one.high, foot, TOP):.1f}"'
                marks.append(f'<line class="whisker" x1="{px:.1f}" x2="{px:.1f}" {ends}/>')
            kind = "dot" if len(curve) <= MAX_DOTS else "dot hidden"
            marks.append(
                f'<circle class="{kind}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{escape(told)}</title></circle>'
            )
        lines.append(f'<g class="s{number % 6}"><polyline points="{" ".join(points)}"/>{"".join(marks)}</g>')
    return "\n".join([*lines, "</svg>"])


def value_axis(values: Sequence[float]) -> Axis:
    """From a round number below the values to one above; logarithmic where they lie decades apart."""
    low, high = min(values), max(values)
    if low > 0 and high > LOG_FROM * median(values):
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        powers = range(first, last + 1, math.ceil((last - first) / 6))
        return Axis(10.0**first, 10.0**last, tuple(10.0**power for power in powers), log=True)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 10 or 1.0
        low, high = low - room, high + room
    step = _round_up((high - low) / 4)
    ticks = tuple(i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def step_axis(steps: Sequence[int]) -> Axis:
    """From the first step to the last, with ticks at round ones."""
    low, high = min(steps), max(steps)
    if low == high:
        return Axis(low - 1, high + 1, (low,))
    step = max(1, round(_round_up((high - low) / 6)))
    return Axis(low, high, tuple(range(math.ceil(low / step) * step, high + 1, step)))


def _round_up(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= rough), 10 * power)


def _in_parts(curve: Curve) -> list[tuple[int, int, Interval]]:
    """First step, last step and value of each point that is drawn; of several steps mean, least and largest value."""
    size = math.ceil(len(curve) / MAX_POINTS)
    if size <= 1:
        return [(step, step, one) for step, one in curve]
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    values = [[one.value for _, one in part] for part in parts]
    means = [Interval(fmean(some), min(some), max(some)) for some in values]
    return [(part[0][0], part[-1][0], mean) for part, mean in zip(parts, means, strict=True)]


def _label(value: float) -> str:
    return f"{value:,.10g}"
