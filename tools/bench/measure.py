"""What the benchmarks share: the command line, timing in turns, new processes, a table to read and JSON to keep."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
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
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAITS = [f"{runtime}{what}Synchronize" for runtime in ("cuda", "hip") for what in ("Stream", "Device", "Event")]
"""Calls of the runtime in which the CPU waits for the device."""
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
    with user_errors(), tempfile.TemporaryDirectory(prefix="vft-", dir=getattr(options, "folder", None)) as folder:
        for name, values in vars(options).items():
            for value in values if isinstance(values, list) else [values]:
                if type(value) in (int, float) and (value < 0 or (not value and name not in may_be_zero)):
                    least = "at least 0" if name in may_be_zero else "above 0"
                    raise UserError(f"--{name.replace('_', '-')} {value}: must be {least}")
        yield options, Path(folder)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one run, with the GPU's work."""
    synchronise()
    begin = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - begin


def in_turns(works: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of several kinds of work, taken in turns, so that other load on the machine affects all alike. The first
    `warm_up` rounds are not counted."""
    rounds = [{name: seconds_of(work) for name, work in works.items()} for _ in range(warm_up + repeats)]
    return {name: [times[name] for times in rounds[warm_up:]] for name in works}


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_new_process(script: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """What `script` prints as its last line, which is JSON. UserError, with its last message, if it fails."""
    command = [sys.executable, script, *map(str, arguments)]
    own = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"{arguments[1]}: {message.removeprefix('error: ')}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
        content = {"title": title, "environment": where, "settings": vars(options), **facts, "rows": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


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
