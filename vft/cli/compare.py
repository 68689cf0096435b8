"""Lay runs side by side: python tools/compare.py RUN RUN... [--html FILE]

Settings that differ, how each run went, the scores of its last evaluation with their 95 % intervals, and how far they
are from the first run's, question by question, where both answered the same ones. --html draws the curves of all runs
over one another.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from rich.console import Console
from rich.table import Table

from vft.cli.arguments import parse_arguments
from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.scores import Interval
from vft.config.run import flatten
from vft.reporting.chart import Curve, line_chart
from vft.reporting.run_folder import RecordedRun, is_number, read_run
from vft.reporting.run_report import CURVES
from vft.reporting.score_tables import change_text, score_text

MAX_RUNS = 6
"""Colours that a chart has."""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>runs compared</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; color: #1b1c1f }
table { border-collapse: collapse } th, td { padding: .2rem 1.1rem .2rem 0; text-align: left; vertical-align: top }
tbody tr { border-top: 1px solid #dcdee3 } .charts { display: grid; gap: 1rem;
grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) } figure { margin: 0 }
.chart text { font-size: 11px; fill: #63666d } .chart .y { text-anchor: end; dominant-baseline: central }
.chart .x { text-anchor: middle } .chart .grid { stroke: #dcdee3 }
.chart polyline { fill: none; stroke: var(--c); stroke-width: 1.6 } .chart circle { fill: var(--c) }
.chart .hidden { fill: transparent } .chart .whisker { stroke: var(--c); stroke-opacity: .45; stroke-width: 2 }
.legend::before { content: "— "; color: var(--c); font-weight: bold } .legend { margin-left: .8rem }
{% for colour in ["#0068a8", "#c75000", "#008060", "#a8427f", "#8a6d00", "#5b5fc7"] %}
.s{{ loop.index0 }} { --c: {{ colour }} }
{% endfor %}
</style>
<h1>Runs compared</h1>
{% for title, rows in tables.items() if rows %}
<h2>{{ title }}</h2>
<table><thead><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for label, cells in rows.items() %}
<tr><th>{{ label }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% endfor %}
<h2>Curves</h2>
<div class="charts">
{% for title, chart in charts.items() %}
<figure><figcaption>{{ title }}
{%- for name in chart.names %}<span class="legend s{{ loop.index0 }}">{{ name }}</span>{% endfor %}
</figcaption>{{ chart.svg | safe }}</figure>
{% endfor %}
</div>
"""
Rows = dict[str, list[str]]
"""A table: a label to a cell for each run."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        runs = read(arguments.runs)
        tables = {
            "Settings that differ": settings(runs),
            "Course": course(runs),
            "Last evaluation": scores(runs),
            f"Last evaluation, less that of {next(iter(runs))}": differences(runs),
        }
        for title, rows in tables.items():
            show(title, list(runs), rows)
        rules = {name: run.about.get("rules", 1) for name, run in runs.items()}
        if len(set(rules.values())) > 1:
            told = ", ".join(f"{name} {version}" for name, version in rules.items())
            print(f"warning: samples were made and scored by different rules ({told}): scores don't compare")
        if arguments.html is not None:
            page = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
            charts = {title: chart for title, chart in curves(runs).items() if chart["names"]}
            replace_text(arguments.html, page.render(names=list(runs), tables=tables, charts=charts))
            print(f"wrote {arguments.html}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with the curves of all")


def read(folders: list[Path]) -> dict[str, RecordedRun]:
    """The runs by the shortest names that tell them apart. UserError where one is none, or there are too many."""
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs: at most {MAX_RUNS} can be told apart side by side")
    for folder in folders:
        if not (folder / "config.toml").is_file():
            raise UserError(f"{folder}: no config.toml; name the output_dir of a run")
    whole = [str(folder.resolve()) for folder in folders]
    if len(set(whole)) < len(whole):
        raise UserError(f"{', '.join(map(str, folders))}: a run is named twice; name each once")
    shared = os.path.commonpath([str(Path(path).parent) for path in whole])
    return {os.path.relpath(path, shared): read_run(Path(path)) for path in whole}


def settings(runs: Mapping[str, RecordedRun]) -> Rows:
    """Settings that are not the same in all; `output_dir` never is."""
    flat = [flatten(run.config) for run in runs.values()]
    keys = sorted({key for one in flat for key in one} - {"output_dir"})
    rows = {key: [str(one.get(key, "")) for one in flat] for key in keys}
    return {key: cells for key, cells in rows.items() if len(set(cells)) > 1}


def course(runs: Mapping[str, RecordedRun]) -> Rows:
    """How far each run came, how fast, and with what losses."""
    rows: Rows = {}
    for number, run in enumerate(runs.values()):
        for label, cell in _course(run).items():
            rows.setdefault(label, [""] * len(runs))[number] = cell
    return rows


def _course(run: RecordedRun) -> dict[str, str]:
    if not run.steps:
        return {"steps": "0"}
    tail = run.steps[-10:]
    seconds, tokens, samples = (sum(row[key] for row in run.steps) for key in ("step_time_s", "tokens", "samples"))
    waited = sum(row["data_wait_s"] for row in run.steps)
    return {
        "steps": f"{run.steps[-1]['step']:,}",
        "samples": f"{samples:,}",
        "loss, mean of the last 10 steps": f"{sum(row['loss'] for row in tail) / len(tail):.4f}",
        "time in steps": str(timedelta(seconds=round(seconds))),
        "tokens a second": f"{tokens / seconds:,.0f}",
        "samples a second": f"{samples / seconds:,.2f}",
        "waiting for data": f"{waited / seconds:.0%}",
        "peak memory": f"{max(row['peak_memory_bytes'] for row in run.steps) / 2**30:.2f} GiB",
        "device": f"{run.about.get('processes', '?')} x {run.about.get('device', '?')}",
        "left out": f"{len(run.quarantine):,} samples" if run.quarantine else "nothing",
    }


def scores(runs: Mapping[str, RecordedRun]) -> Rows:
    """Scores of each run's last evaluation."""
    last = [last_scores(run) for run in runs.values()]
    names = dict.fromkeys(name for one in last for name in one)
    rows = {name: [told(one.get(name)) for one in last] for name in names}
    if rows:
        rows = {"": [[*run.evaluations][-1] if run.evaluations else "not evaluated" for run in runs.values()], **rows}
    return rows


def told(score: Interval | None) -> str:
    """A score with its interval, and how its texts were cut where it is one of texts."""
    return "" if score is None else " ".join(score_text(score)).strip() + score.how_cut


def differences(runs: Mapping[str, RecordedRun]) -> Rows:
    """Of the others' last scores from the first run's; none where no two runs kept what they were computed from."""
    first, *others = [last_scores(run) for run in runs.values()]
    rows = {}
    for name, score in first.items():
        after = [one[name] if name in one and one[name].parts is not None else None for one in others]
        if score.parts is not None and any(after):
            rows[name] = ["", *(" ".join(change_text(score, one)).strip() for one in after)]
    return rows


def last_scores(run: RecordedRun) -> Mapping[str, Interval]:
    """Of the last evaluation; none where there was none."""
    return [*run.evaluations.values()][-1] if run.evaluations else {}


def curves(runs: Mapping[str, RecordedRun]) -> dict[str, dict[str, Any]]:
    """Charts by title: of the steps, then of each score that isn't a group's."""
    drawn: dict[str, dict[str, Curve]] = {}
    for name, run in runs.items():
        for key, title in CURVES.items():
            values = [(row["step"], Interval.point(row[key])) for row in run.steps if is_number(row.get(key))]
            drawn.setdefault(title, {})[name] = values
        for when, found in run.evaluations.items():
            for metric, score in found.items():
                if "/" not in metric:
                    one: list[Any] = drawn.setdefault(f"held-out {metric}", {}).setdefault(name, [])  # type: ignore[assignment]
                    one.append((int(when.split()[1]), score))
    filled = {title: {name: curve for name, curve in series.items() if curve} for title, series in drawn.items()}
    return {
        title: {"names": list(series), "svg": line_chart(title, series)} for title, series in filled.items() if series
    }


def show(title: str, names: list[str], rows: Rows) -> None:
    """A table on the terminal; nothing where it is empty."""
    if not rows:
        return
    table = Table(title=title)
    for name in ("", *names):
        table.add_column(name, overflow="fold")
    for label, cells in rows.items():
        table.add_row(label, *cells)
    Console(markup=False, emoji=False).print(table)  # brackets and colons of labels are text


if __name__ == "__main__":
    main()
