"""What is wrong with this machine's set-up, and how to mend it: python tools/doctor.py [CONFIG.toml]

Packages, FFmpeg, GPUs, a sum over two processes, shared memory, disk, hub, processors. Exit status 1 where something
would stop or spoil a run. With a configuration its model, data and folders are looked at too.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vft.cli.doctor_checks.finding import Finding
from vft.cli.doctor_checks.packages import decoding, packages, torch_loads


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path, nargs="?", help="TOML file of a training run to look at too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that go before the file's")
    parser.add_argument("--output", type=Path, help="folder to write to (default: the configuration's output_dir)")
    parser.add_argument("--processes", type=int, default=1, help="training processes on this host (default 1)")
    parser.add_argument("--shared-memory", type=Path, default=Path("/dev/shm"), help="its folder (default /dev/shm)")
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    arguments = parser.parse_intermixed_args()
    findings = list(examine(arguments))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        show(findings)
    raise SystemExit(any(finding.status == "error" for finding in findings))


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """All findings, in the order in which a user would mend them."""
    yield from packages()
    loads = list(torch_loads())
    yield from loads
    if any(finding.status == "error" for finding in loads):
        return  # all that follows needs it

    import torch

    from vft.cli.doctor_checks.devices import devices, round_trip
    from vft.cli.doctor_checks.machine import (
        data_of,
        descriptors,
        folder,
        hub,
        pending_bytes,
        processors,
        shared_memory,
    )
    from vft.common.console import user_errors
    from vft.config import run as configs
    from vft.config.data import DataConfig

    with user_errors():
        config = configs.load(arguments.config, arguments.overrides) if arguments.config else None
    yield from decoding()
    yield from devices(torch)
    yield from round_trip(torch.cuda.device_count())
    data = config.data if config else DataConfig()
    yield from shared_memory(arguments.shared_memory, arguments.processes * pending_bytes(data))
    yield from folder("cache folder", data.cache_path, "set VFT_CACHE or data.cache_dir to another folder")
    output = arguments.output or (config.output_dir if config else None)
    if output is not None:
        yield from folder("output folder", output, "name another output_dir")
    yield from processors(arguments.processes)
    yield from descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield from hub(config)
    if config is not None:
        yield from data_of(config)


def show(findings: Sequence[Finding]) -> None:
    """The report as a table."""
    table = Table(title="doctor", show_lines=False)
    for name in ("", "what", "found", "mend"):
        table.add_column(name, overflow="fold")
    colour = {"ok": "green", "warning": "yellow", "error": "red"}
    for one in findings:
        # Text, not markup: brackets in a message are no styles.
        table.add_row(Text(one.status, colour[one.status]), Text(one.what), Text(one.found), Text(one.mend))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
