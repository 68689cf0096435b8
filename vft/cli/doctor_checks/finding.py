"""The result of a check, and the child processes that checks start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

TIMEOUT_S = 180.0
"""For a child process; importing torch from a slow network disk takes minutes."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Literal["ok", "warning", "error"]
    what: str
    found: str
    fix: str = ""


def start(code: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start this Python on `code`, with `environment` added to the current one."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a process; after `TIMEOUT_S` it is killed, and its exit status is 1."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return subprocess.CompletedProcess(process.args, 1, "", f"still running after {TIMEOUT_S:g} s")
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process of this Python."""
    return finish(start(code, {}, *arguments))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The exception at the end of a traceback; else the last line on stderr, or the exit status."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return (exceptions or lines or [f"exit status {done.returncode}"])[-1].strip()[:200]
