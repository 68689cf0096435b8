"""One command in several processes that find each other, as torchrun starts them, without the seconds it takes; and the
processes that a command started."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from tests.runs.commands import Commands, Result

PATIENCE_S = 100.0
"""Until processes that wait for each other for ever are ended."""
LAST_WORDS_S = 20.0
"""The same, once one of them has failed: the others hear of it and end by themselves."""


def run_together(
    commands: Commands, processes: int, program: str, *arguments: object, **environment: str
) -> list[Result]:
    """How each of `processes` ended; killed where they take too long, or don't end soon after one that failed."""
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} for rank in range(processes)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [commands.start(program, *arguments, **place, **address, **environment) for place in places]
    end = time.monotonic() + PATIENCE_S
    while any(one.is_running for one in started):
        failed = any(not one.is_running and one.wait().status for one in started)
        if failed:
            end = min(end, time.monotonic() + LAST_WORDS_S)
        if time.monotonic() > end:
            for one in started:
                if one.is_running:
                    one.kill()
        time.sleep(0.02)
    return [one.wait() for one in started]


def free_port() -> str:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def descendants(pid: int) -> dict[int, int]:
    """Processes that `pid` or its threads started, and theirs, each with its parent."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return {one: parents[one] for one in found[1:]}
