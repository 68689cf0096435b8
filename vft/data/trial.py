"""Tries untrusted work (a chat template is a program) in a copy of this process, with limits on time and memory."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress

TIMEOUT_S = 60.0
"""Wall-clock time. A copy that has not used its CPU time by then waits for something other than `work`."""


def exceeds(work: Callable[[], object], cpu_s: int, memory_bytes: int) -> str | None:
    """Which limit `work` exceeds: CPU time in seconds, or memory in bytes beyond what this process has. None if it
    exceeds none, whatever it raises."""
    pid = os.fork()
    if pid == 0:
        _try(work, cpu_s, memory_bytes)
    end = time.monotonic() + TIMEOUT_S
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(ended[1])
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"more than {cpu_s} s"
    return None if status == 0 else f"more than {memory_bytes >> 20} MiB of memory"


def _try(work: Callable[[], object], cpu_s: int, memory_bytes: int) -> None:
    """Never returns: no handler and no `finally` of the original process may run in the copy."""
    status = 1
    with suppress(BaseException):
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115
        size = pages * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
        try:
            work()
            status = 0
        except BaseException as error:
            status = int(isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError))
    os._exit(status)
