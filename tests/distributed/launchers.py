"""torchrun as a process that goes on beside the test, and the processes that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import REPOSITORY, Command, Result


class Launcher(subprocess.Popen[bytes]):
    """A command with its output in a file; what is left of it is killed at the end."""

    def __init__(self, words: Sequence[str], environment: dict[str, str], log: Path, folder: Path = REPOSITORY) -> None:
        self.log = log
        words = [sys.executable if word == "python" else word for word in words]
        with log.open("w") as file:
            super().__init__(words, cwd=folder, env=environment, stdout=file, stderr=file, start_new_session=True)

    def __exit__(self, *error: Any) -> None:
        left = rank_processes(self.pid)
        for pid in ([self.pid] if self.is_running() else []) + list(left.values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(timeout=30)

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.poll() is None

    def output(self) -> str:
        """What it and its processes have said."""
        return self.log.read_text()


def rank_processes(launcher: int) -> dict[int, int]:
    """Pids of the training processes that `launcher` started, by rank."""
    found = {}
    for child in _children(launcher):
        try:
            pairs = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if "RANK" in values:
            found[int(values["RANK"])] = child
    return found


def ours(text: str) -> list[str]:
    """The lines with which vft says that a run ends."""
    return [line for line in text.splitlines() if line.startswith(("error: ", "stopped: "))]


def ended(command: Command, seconds: float) -> Result:
    """How it ended; the test fails where it goes on for longer."""
    end = time.monotonic() + seconds
    while command.is_running and time.monotonic() < end:
        time.sleep(0.05)
    if command.is_running:
        command.kill()
        pytest.fail(f"still running after {seconds:g} s")
    return command.wait()


def wait_for_step(folder: Path, step: int, is_running: Callable[[], bool], seconds: float = 120) -> None:
    """Until `step` is on record; an error where the run ends before."""
    file, end = folder / "metrics.jsonl", time.monotonic() + seconds
    while not file.exists() or file.read_bytes().count(b"\n") < step:
        assert is_running(), "the run ended"
        assert time.monotonic() < end, f"no step {step} within {seconds:g} s"
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in text.read_text().split()] if text.exists() else []
