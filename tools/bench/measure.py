"""What the benchmarks share: the command line, timing in turns, medians, a table to read and JSON to keep."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vft.common.console import user_errors
from vft.common.errors import UserError

Row = Mapping[str, Any]
LOAD = os.getloadavg()[0]
"""Load of the machine before the benchmark."""


@contextmanager
def benchmark(
    text: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    repeats: int = 5,
    may_be_zero: Collection[str] = (),
) -> Iterator[tuple[argparse.Namespace, Path]]:
    """Options and a temporary folder of a benchmark; every benchmark has --repeats and --output.

    UserError, shown as one line, if a number is 0 or below; those in `may_be_zero` may be 0.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed runs of each kind (default {repeats})")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    with (
        user_errors(),
        tempfile.TemporaryDirectory(prefix="vft-bench-", dir=getattr(options, "folder", None)) as folder,
    ):
        for name, values in vars(options).items():
            for value in values if isinstance(values, list) else [values]:
                least = 0 if name in may_be_zero else 1
                option = f"--{name.replace('_', '-')} {value}"
                if type(value) is int and value < least:
                    raise UserError(f"{option}: must be at least {least}")
                if isinstance(value, float) and (value < 0 or (least and not value)):
                    raise UserError(f"{option}: must be above 0")
        yield options, Path(folder)


def seconds_of(work: Callable[[], Any], repeats: int = 5, warm_up: int = 1) -> list[float]:
    """Wall-clock seconds of each of `repeats` runs after `warm_up` uncounted ones; waits for the GPU's work."""
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
    """Seconds of several kinds of work, taken in turns, so that other load on the machine affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            times[name] += seconds_of(work, repeats=1, warm_up=0)
    return times


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def default_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> dict[str, Any]:
    """The machine that the figures were taken on, and when."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": LOAD,
    }


def report(title: str, rows: Sequence[Row], options: argparse.Namespace, **facts: Any) -> None:
    """Print `rows` as a table, and write them with options, environment and `facts` to the JSON file `--output`."""
    where = environment()
    show_table(title, rows, ", ".join(f"{name} {value}" for name, value in where.items()))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        content = {
            "title": title,
            "environment": where,
            "settings": settings,
            **facts,
            "rows": [dict(row) for row in rows],
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show_table(title: str, rows: Sequence[Row], caption: str = "") -> None:
    """Print `rows` as a table; columns are in the order in which the rows first name them."""
    table = Table(title=title, caption=caption)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    for row in rows:
        table.add_row(*(shown(row.get(name, "")) for name in columns))
    Console(width=None if os.isatty(1) else 160).print(table)


def shown(value: Any) -> str:
    """A float with four significant digits, anything else as it is."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
