"""Lay runs side by side: vft compare RUN RUN... [--html FILE]

Prints the settings that differ, how each run went, the scores of its last evaluation with their 95 % intervals, and the
differences from the first run's scores if both answered the same questions. --html also draws the curves of all runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from vft.cli.arguments import Arguments, ExistingFolder, Positional, command, written_as
from vft.common.console import make_table, print_table
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.common.scores import Interval
from vft.config.run import flatten
from vft.metrics import scale_of
from vft.reporting.page import render
from vft.reporting.report import change_text, chart, curves_of, score_text
from vft.reporting.run_folder import RecordedRun, Scores, read_run

MAX_RUNS = 6
"""As many as a chart has colours."""
LAST = "Last evaluation"
Rows = dict[str, list[str]]
"""A table: a label to a cell for each run."""


class CompareArguments(Arguments):
    """Arguments of `vft compare`."""

    runs: Annotated[list[ExistingFolder], Positional("RUN")]
    """output_dir of a run"""
    html: Annotated[Path, written_as(".html")] | None = None
    """also write a page with the curves of all"""


@command(CompareArguments, __doc__)
def main(arguments: CompareArguments) -> None:
    """Command line."""
    runs = read(arguments.runs)
    for title, rows in tables(runs).items():
        if rows:
            print_table(make_table(title, ["", *runs], ([label, *cells] for label, cells in rows.items())))
    rules = {name: run.about.get("rules", 1) for name, run in runs.items()}
    if len(set(rules.values())) > 1:
        versions = ", ".join(f"{name} {version}" for name, version in rules.items())
        print(f"warning: samples were made and scored by different rules ({versions}): scores don't compare")
    if arguments.html is not None:
        replace_text(arguments.html, comparison_page(runs))
        print(f"wrote {arguments.html}")


def tables(runs: Mapping[str, RecordedRun]) -> dict[str, Rows]:
    """What is compared, by title."""
    return {
        "Settings that differ": settings(runs),
        "Course": course(runs),
        LAST: scores(runs),
        f"{LAST}, less that of {next(iter(runs))}": differences(runs),
    }


def comparison_page(runs: Mapping[str, RecordedRun]) -> str:
    """The page with the tables and the curves of all runs."""
    curves = {name: curves_of(run) for name, run in runs.items()}
    titles = dict.fromkeys(title for own in curves.values() for title in own if "/" not in title)
    series = {title: {name: own[title] for name, own in curves.items() if title in own} for title in titles}
    shown = {"names": list(runs), "tables": tables(runs), "scored": LAST, "scale_of": scale_of}
    return render("comparison.html", title="Runs compared", charts=[chart(*one) for one in series.items()], **shown)


def read(folders: list[Path]) -> dict[str, RecordedRun]:
    """The runs by the shortest names that tell them apart. UserError if a folder is no run, or there are too many."""
    if len(folders) > MAX_RUNS:
        raise UserError(f"{len(folders)} runs: at most {MAX_RUNS} can be compared at once")
    for folder in folders:
        if not (folder / "config.toml").is_file():
            raise UserError(f"{folder}: no config.toml; name the output_dir of a run")
    paths = [str(folder.resolve()) for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError(f"{', '.join(map(str, folders))}: a run is named twice; name each once")
    shared = os.path.commonpath([str(Path(path).parent) for path in paths])
    return {os.path.relpath(path, shared): read_run(Path(path)) for path in paths}


def settings(runs: Mapping[str, RecordedRun]) -> Rows:
    """Settings that are not the same in all runs, except `output_dir`."""
    configs = [flatten(run.config) for run in runs.values()]
    keys = sorted({key for config in configs for key in config} - {"output_dir"})
    rows = {key: [str(config.get(key, "")) for config in configs] for key in keys}
    return {key: cells for key, cells in rows.items() if len(set(cells)) > 1}


def course(runs: Mapping[str, RecordedRun]) -> Rows:
    """Steps, losses, speed and memory of each run."""
    own = [_course(run) for run in runs.values()]
    return {
        label: [cells.get(label, "") for cells in own] for label in dict.fromkeys(key for one in own for key in one)
    }


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
    names = dict.fromkeys(name for scores in last for name in scores)
    rows = {name: [cell(scores.get(name)) for scores in last] for name in names}
    if rows:
        rows = {"": [[*run.evaluations][-1] if run.evaluations else "not evaluated" for run in runs.values()], **rows}
    return rows


def cell(score: Interval | None) -> str:
    """A score with its interval and, if it is a score of texts, their tokenization."""
    return "" if score is None else " ".join(score_text(score)).strip() + score.how_cut


def differences(runs: Mapping[str, RecordedRun]) -> Rows:
    """Differences of the other runs' last scores from the first run's, if both keep the scores of single questions."""
    first, *others = [last_scores(run) for run in runs.values()]
    rows = {}
    for name, score in first.items():
        after = [scores.get(name) for scores in others]
        after = [other if other is not None and other.parts is not None else None for other in after]
        if score.parts is not None and any(after):
            rows[name] = ["", *(" ".join(change_text(score, other)).strip() for other in after)]
    return rows


def last_scores(run: RecordedRun) -> Scores:
    """Scores of the last evaluation; empty if there was none."""
    return [*run.evaluations.values()][-1] if run.evaluations else {}
