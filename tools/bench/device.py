#!/usr/bin/env python
"""Prove vft on this machine's accelerator: python tools/bench/device.py [--quick] [--only PART ...] [--folder DIR]

Every part runs the trainer's own commands, in processes of its own with a time limit, and says which of its bounds do
not hold. Parts that are finished are kept in the folder: the same command goes on with the others. At the end there is
a table, `device.json` has all figures, and the exit status is 0 only if every part ended and everything holds.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import in_venv  # noqa: F401
from device_parts import PARTS, QUICK, Bench, Row
from device_sizes import SIZES
from measure import DEVICE, show_table

from vft.common.console import user_errors
from vft.common.errors import UserError

LIMIT_S = 480.0
"""Of one part, by default."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="the essentials: 10 minutes instead of 40")
    parser.add_argument("--again", action="store_true", help="also run the parts that are finished")
    parser.add_argument("--folder", type=Path, default=Path("runs/device"), help="for everything (runs/device)")
    parser.add_argument("--size", choices=list(SIZES), help="of models and rows (default: large; with --quick: quick)")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help=f"seconds that a part may take ({LIMIT_S:g})")
    parser.add_argument("--launch", default="", help="words of a shell before the programs that use the device")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # a child process
    options = parser.parse_args()
    with user_errors():
        if options.part:
            run_part(bench_of(options), options.part)
            return
        if DEVICE.type != "cuda" and not options.launch:
            raise UserError("no accelerator: torch.cuda.is_available() is False; `vft doctor` says why")
        raise SystemExit(0 if run_all(options) else 1)


def bench_of(options: argparse.Namespace) -> Bench:
    """What the options say."""
    size = SIZES[options.size or ("quick" if options.quick else "large")]
    return Bench(options.folder.absolute(), size, tuple(shlex.split(options.launch)), options.eager)


def run_all(options: argparse.Namespace) -> bool:
    """Run the parts, show and write what they found. Returns whether everything holds."""
    bench = bench_of(options)
    bench.folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({"size": asdict(bench.size), "eager": bench.eager}))  # as it is read back
    results: dict[str, Any] = {}
    for name in options.only or (QUICK if options.quick else list(PARTS)):
        file = bench.folder / f"{name}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if options.again or known.get("settings") != settings or not known.get("ended"):
            known = {"settings": settings, **one_part(bench, name, options.limit)}
            file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        results[name] = known
        for title in dict.fromkeys(row.get("table", name) for row in known["rows"]):
            rows = [row for row in known["rows"] if row.get("table", name) == title]
            show_table(title, [shown(row) for row in rows])
        sys.stdout.flush()
    (bench.folder / "device.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show_table("this device", [summary(name, result) for name, result in results.items()])
    return all(summary(name, result)["holds"] == "yes" for name, result in results.items())


def shown(row: Row) -> Row:
    """A row of a table, what is wrong with it last."""
    return {key: value for key, value in row.items() if key not in ("table", "wrong")} | {"wrong": row.get("wrong", "")}


def one_part(bench: Bench, name: str, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own: its rows, seconds, and whether it ended by itself."""
    folder = bench.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = [*bench.launcher, __file__, *sys.argv[1:], "--part", name]
    began = time.perf_counter()
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: Any = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = f"ended after {limit_s:g} s, its limit"
        finally:
            bench.end(process)
    rows = bench.rows(name)
    if status:
        last = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        why = status if isinstance(status, str) else f"status {status}: {''.join(last)[:300]}"
        rows.append({"what": "the part itself", "wrong": f"{why}; see {folder / 'log.txt'}"})
    return {"ended": not status, "seconds": time.perf_counter() - began, "rows": rows}


def run_part(bench: Bench, name: str) -> None:
    """Run a part in this process. Each row is written as soon as it is known."""
    for row in PARTS[name](bench.of(name)):
        with bench.rows_file(name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def summary(name: str, result: dict[str, Any]) -> Row:
    """The line of a part in the last table."""
    wrong = [f"{row['what']}: {row['wrong']}" for row in result["rows"] if row.get("wrong")]
    if not result["rows"]:
        wrong.append("nothing was found")
    return {
        "part": name,
        "seconds": result["seconds"],
        "rows": len(result["rows"]),
        "holds": "no" if wrong else "yes",
        "what does not": "; ".join(wrong),
    }


if __name__ == "__main__":
    main()
