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
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vft.common.errors import UserError
from vft.common.files import replace_text

TAIL_BYTES = 64 * 1024
"""Of a log, shown from its end."""

_children: dict[Path, subprocess.Popen[bytes]] = {}
"""Jobs that this process started: asked after now and then, so that they don't stay behind as zombies."""


@dataclass(frozen=True)
class Job:
    """The job of a folder, which need not have one yet."""

    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """`argv`, `pid`, `started`, and `stopping` once it was asked to stop; empty if there was no job."""
        file = self.folder / "job.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def is_alive(self) -> bool:
        """Whether its process is there."""
        if self.folder in _children:
            _children[self.folder].poll()
        try:
            with (self.folder / "job.lock").open("rb") as lock:
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
        with (self.folder / "job.lock").open("wb") as lock, (self.folder / "job.log").open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder}: is at work already, perhaps started from another tab") from None
            for name, text in (files or {}).items():
                replace_text(self.folder / name, text)
            started = datetime.now(UTC).isoformat(timespec="seconds")
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
            record = {"argv": [*argv], "pid": process.pid, "started": started}
            replace_text(self.folder / "job.json", json.dumps(record, indent=1) + "\n")
        _children[self.folder] = process

    def stop(self, at_once: bool = False) -> None:
        """Ask it to save and end, as Ctrl-C does; a second request, from whichever tab, changes nothing. `at_once`
        ends all of its processes without saving. UserError if it is not at work."""
        record = self.record
        if not self.is_alive:
            raise UserError(f"{self.folder}: is not at work")
        pid: int = record["pid"]
        if at_once:
            os.killpg(pid, signal.SIGKILL)
        elif "stopping" not in record:
            replace_text(self.folder / "job.json", json.dumps({**record, "stopping": True}, indent=1) + "\n")
            os.kill(pid, signal.SIGTERM)

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
