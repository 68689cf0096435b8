"""Commands that go on without the page: training runs, merges.

A job is a process in a session of its own. Its folder says what it is (`job.json`), what it printed (`job.log`) and
whether it is alive: it holds a lock on `job.lock`, which the system takes away when it ends, however it ends. So a page
that was killed finds its jobs again, and two tabs can't start the same one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.reporting.run_folder import read_json

TAIL_BYTES = 64 * 1024
"""Of a log, shown from its end."""

_changing = threading.RLock()
"""Held while a job is started, stopped or asked after: two tabs that stop it at once are one signal."""
_children: dict[Path, subprocess.Popen[bytes]] = {}
"""Jobs that this process started: asked after now and then, so that they don't stay behind as zombies."""


@dataclass(frozen=True)
class Job:
    """The job of a folder, which need not have one yet."""

    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """`argv`, `host`, `started`; `pid` once it runs, `stopping` once it was asked to; empty if there was none."""
        return read_json(self.folder / "job.json")

    @property
    def is_alive(self) -> bool:
        """Whether its process is there."""
        if self.folder in _children:
            _children[self.folder].poll()
        try:
            with _changing, (self.folder / "job.lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def start(
        self, argv: Sequence[str], cwd: Path, environment: Mapping[str, str], files: Mapping[str, str] | None = None
    ) -> None:
        """Start `argv` in `cwd`, with `environment` over that of this process. Its output is added to `job.log`.
        `files` are written to the job's folder first, by name.

        Raises UserError if the job is at work already.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_file, log_file = self.folder / "job.lock", self.folder / "job.log"
        with _changing, lock_file.open("wb") as lock, log_file.open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: is at work already, perhaps started from another tab") from None
            for name, text in (files or {}).items():
                replace_text(self.folder / name, text)
            started = datetime.now(UTC).isoformat(timespec="seconds")
            record = {"argv": [*argv], "host": socket.gethostname(), "started": started}
            self._write(record)  # without the last one's process: nobody must stop that number
            log.write(f"$ {shlex.join(argv)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],  # the lock is the child's as soon as this process closes it
            )
            self._write({**record, "pid": process.pid})
        _children[self.folder] = process

    def stop(self, at_once: bool = False) -> None:
        """Ask it to save and end, as Ctrl-C does; a second request, from whichever tab, changes nothing. `at_once`
        ends all of its processes without saving. UserError if it is not at work."""
        with _changing, suppress(ProcessLookupError):  # it has just ended
            record = self.record
            if not self.is_alive:
                raise UserError(f"{self.folder}: is not at work")
            pid = record.get("pid")
            if not isinstance(pid, int) or pid < 2 or record.get("host") != socket.gethostname():
                where = record.get("host", "another machine")
                raise UserError(f"{self.folder}: is at work on {where}, as an unknown process; stop it there")
            if at_once:
                os.killpg(pid, signal.SIGKILL)
            elif "stopping" not in record:
                self._write({**record, "stopping": True})
                os.kill(pid, signal.SIGTERM)

    def _write(self, record: Mapping[str, Any]) -> None:
        replace_text(self.folder / "job.json", json.dumps(record, indent=1) + "\n")

    def tail(self) -> str:
        """The end of its output since it was started last. Of a line that was drawn again and again, as progress bars
        are, the last state."""
        file = self.folder / "job.log"
        if not file.is_file():
            return ""
        with file.open("rb") as log:
            log.seek(max(0, file.stat().st_size - TAIL_BYTES))
            text = log.read().decode(errors="replace")
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        begin = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=0)
        return "\n".join(lines[begin:])
