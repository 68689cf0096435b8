"""Check this machine's set-up and say how to fix it.

Looks at packages, FFmpeg, GPUs, a sum over two processes, shared memory, disk space, processors and the hub; with a
configuration also at its model, data and folders. Needs nothing but Python itself. The exit status is 1 if something
would stop or spoil a run.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from vft.cli.arguments import add_config_arguments, parse_arguments
from vft.cli.doctor_checks.finding import Finding
from vft.cli.doctor_checks.packages import NOT_INSTALLED, check_decoding, check_packages, check_torch

COLOURS = {"ok": 32, "warning": 33, "error": 31}
"""ANSI's number for the colour of a status."""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    findings = list(examine(arguments) if arguments.json else show(examine(arguments)))
    if arguments.json:
        # "mend" is the earlier name of "fix".
        print(json.dumps([asdict(finding) | {"mend": finding.fix} for finding in findings], indent=1))
    raise SystemExit(any(finding.status == "error" for finding in findings))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add_config_arguments(parser, optional=True)
    parser.add_argument("--output", type=Path, help="folder of the run (default: output_dir of the configuration)")
    parser.add_argument("--processes", type=int, default=1, help="training processes on this host (default 1)")
    parser.add_argument(
        "--shared-memory", type=Path, default=Path("/dev/shm"), help="folder of shared memory (default /dev/shm)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def examine(arguments: argparse.Namespace) -> Iterator[Finding]:
    """All findings, in the order in which a user would fix them."""
    basics = [*check_packages(), *check_torch()]
    yield from basics
    if any(
        (finding.what == "torch" and finding.status == "error") or NOT_INSTALLED in finding.found for finding in basics
    ):
        return  # the other checks need torch and the packages

    import torch

    import vft.data.formats  # noqa: F401  checks the sources of a configuration
    from vft.cli.doctor_checks import devices, machine
    from vft.common.console import user_errors
    from vft.config import run as configs
    from vft.config.data import DataConfig

    with user_errors():
        config = configs.load(arguments.config, arguments.overrides) if arguments.config else None
    yield from check_decoding()
    yield from devices.check_gpus(torch)
    yield from devices.check_two_processes(torch.cuda.device_count())
    data = config.data if config else DataConfig()
    yield from machine.check_shared_memory(
        arguments.shared_memory, arguments.processes * machine.max_pending_bytes(data)
    )
    yield from machine.check_folder(
        "cache folder", data.cache_path, "set VFT_CACHE or data.cache_dir to another folder"
    )
    output = arguments.output or (config.output_dir if config else None)
    if output is not None:
        yield from machine.check_folder("output folder", output, "name another output_dir")
    yield from machine.check_processors(arguments.processes)
    yield from machine.check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    yield from machine.check_hub(config)
    if config is not None:
        yield from machine.check_data(config)


def show(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Print each finding as soon as it is known, in plain text: fixes are commands to copy."""
    for finding in findings:
        status = f"{finding.status:8}"
        if sys.stdout.isatty():
            status = f"\033[{COLOURS[finding.status]}m{status}\033[0m"
        print(f"{status} {finding.what:14} {finding.found}")
        if finding.fix:
            print(f"{'':23} fix: {finding.fix}", flush=True)
        yield finding


if __name__ == "__main__":
    main()
