"""What the benchmarks share: times as medians of several runs, a table to read and JSON to keep."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def seconds_of(work: Callable[[], Any], repeats: int = 5, warm_up: int = 1) -> list[float]:
    """Wall-clock seconds of each of `repeats` runs after `warm_up` that don't count; a GPU's work is waited for."""
    times = []
    for number in range(warm_up + repeats):
        synchronise()
        begin = time.perf_counter()
        work()
        synchronise()
        if number >= warm_up:
            times.append(time.perf_counter() - begin)
    return times


def interleaved(works: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, list[float]]:
    """Seconds of several kinds of work, taken in turns, so that a machine's moods fall on all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            times[name] += seconds_of(work, repeats=1, warm_up=0)
    return times


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return statistics.median(values)


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def default_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> dict[str, Any]:
    """Where the figures were taken."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
    }


def report(title: str, rows: Sequence[Row], output: Path | None = None, **facts: Any) -> None:
    """Print `rows` as a table, and write them with the environment and `facts` as JSON where `output` says so."""
    where = environment()
    show_table(title, rows, ", ".join(f"{name} {value}" for name, value in where.items()))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "environment": where, **facts, "rows": [dict(row) for row in rows]}
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show_table(title: str, rows: Sequence[Row], caption: str = "") -> None:
    """Print `rows` as a table; the first of them to name a column places it."""
    table = Table(title=title, caption=caption)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    for row in rows:
        table.add_row(*(shown(row.get(name, "")) for name in columns))
    Console(width=None if os.isatty(1) else 160).print(table)


def shown(value: Any) -> str:
    """A number with four digits, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
