"""What a check of tools/doctor.py gives, and the child processes that checks start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

COMMAND_S = 180.0
"""For a child process; importing from a cold network disk takes minutes."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Literal["ok", "warning", "error"]
    what: str
    found: str
    mend: str = ""


def start(code: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | environment, **pipes)


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        output, errors = process.communicate(timeout=COMMAND_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return subprocess.CompletedProcess(process.args, 1, "", f"no end within {COMMAND_S:g} s")
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return finish(start(code, {}, *arguments))


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The exception at the end of a traceback, else what was said last, else how the process ended."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
    return (exceptions or lines or [f"exit status {done.returncode}"])[-1].strip()[:200]
