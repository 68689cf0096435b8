"""Commands as a user gives them, each in a process of its own.

Importing torch and transformers takes seconds, and there are many commands. So one process imports them, and a copy
of it (`fork`) becomes each command: the module or script runs as `__main__` with its own arguments, environment,
standard streams and exit status. At its end threads are joined and exit handlers run, but Python's objects are not
taken apart, which would copy all of that memory and take a second. `shell` and `torchrun` start from nothing instead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
CAPTION = "vft.recipes.caption"
TIMEOUT_S = 240.0
TIMES = (
    *("step_time_s", "data_wait_s", "tokens_per_s", "samples_per_s", "frames_per_s", "tflops", "mfu", "hfu"),
    "peak_memory_bytes",
)
"""Figures of a step that differ from run to run."""

SERVER = r"""
import atexit, gc, importlib, json, os, runpy, signal, sys, threading, traceback

ours = ("vft.training.trainer", "vft.recipes.caption")
# What commands import only where they use it.
late = ("pandas", "pyarrow.compute", "rouge_score.rouge_scorer", "sacrebleu.metrics")
for name in (*ours, *late, "transformers.models.qwen2_5_vl.configuration_qwen2_5_vl"):
    importlib.import_module(name)
for name in ("card.md", "report.html"):
    sys.modules["vft.reporting.page"].TEMPLATES.get_template(name)
for name in [name for name in sys.modules if name.startswith("vft.recipes.")]:
    del sys.modules[name]  # as in a fresh process: runpy is to run it as __main__

def become(request):
    os.setsid()
    for descriptor, path in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(request["folder"], path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    typed = os.path.join(request["folder"], "stdin")
    os.dup2(os.open(typed if os.path.exists(typed) else os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
    sys.argv = [request["program"], *request["arguments"]]
    if request["program"].endswith(".py"):
        sys.path[0] = os.path.dirname(os.path.abspath(request["program"]))
        runpy.run_path(request["program"], run_name="__main__")
    else:
        runpy.run_module(request["program"], run_name="__main__", alter_sys=True)

def status_of(request):
    try:
        become(request)
        return 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)  # as Python does with the message of sys.exit
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1

gc.freeze()  # a collection in a copy would write to every page of the shared memory
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    request = json.loads(line)
    if os.fork() == 0:  # waits for the command and notes its status
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        pid = os.fork()
        if pid == 0:
            status = status_of(request)
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        with open(os.path.join(request["folder"], "pid"), "w") as file:
            file.write(f"{pid}\n")
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with open(os.path.join(request["folder"], ".status"), "w") as file:
            file.write(str(status))
        os.rename(os.path.join(request["folder"], ".status"), os.path.join(request["folder"], "status"))
        os._exit(0)
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int
    """Exit status; a signal's number below zero."""
    stdout: str
    stderr: str

    def ok(self) -> Result:
        """Itself, where the command succeeded."""
        assert self.status == 0, self.stderr[-4000:]
        return self

    @property
    def error(self) -> str:
        """The one line of a user's mistake: exit status 2, one line that begins with `error: `, no traceback."""
        lines = self.stderr.splitlines()
        found = [line for line in lines if line.startswith("error: ")]
        assert self.status == 2, f"exit status {self.status}\n{self.stderr[-4000:]}"
        assert "Traceback" not in self.stderr, self.stderr[-4000:]
        assert len(found) == 1 and lines[-1] == found[0], self.stderr[-4000:]
        return found[0]


class Command:
    """A running command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid = int(_wait_for(folder / "pid"))

    def wait(self) -> Result:
        """Its end."""
        status = int(_wait_for(self.folder / "status"))
        return Result(status, *((self.folder / name).read_text() for name in ("stdout", "stderr")))

    def kill(self) -> Result:
        """SIGKILL: no handler runs, nothing is flushed."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not (self.folder / "status").exists()


class Commands:
    """Starts commands in one environment and folder."""

    def __init__(self, environment: dict[str, str], scratch: Path, folder: Path = REPOSITORY) -> None:
        self.environment, self.scratch, self.folder = environment, scratch, folder
        self.requests = Path(tempfile.mkdtemp(dir=scratch)) / "requests"
        """A FIFO that takes requests from other processes, too."""
        os.mkfifo(self.requests)
        with open(os.open(self.requests, os.O_RDONLY | os.O_NONBLOCK)) as reading:
            self._writing = self.requests.open("w")
            os.set_blocking(reading.fileno(), True)
            self._server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=reading, cwd=folder, env=environment)

    def start(self, program: str, *arguments: object, cwd: Path | None = None, **environment: str) -> Command:
        """A module (`vft.recipes.caption`) or script (`tools/predict.py`) with its arguments, in `cwd`."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        words = [str(a) for a in arguments]
        request = {"program": program, "arguments": words, "folder": str(folder), "cwd": str(cwd or self.folder)}
        self._writing.write(json.dumps({**request, "environment": environment}) + "\n")
        self._writing.flush()
        return Command(folder)

    def run(self, program: str, *arguments: object, cwd: Path | None = None, **environment: str) -> Result:
        """`start`, and wait for its end."""
        return self.start(program, *arguments, cwd=cwd, **environment).wait()

    def train(self, config: Path, *overrides: str) -> Path:
        """Train to the end; the folder that it left."""
        self.run(CAPTION, config, *overrides).ok()
        return config.with_suffix("")

    def shell(self, *command: object) -> Result:
        """A command from nothing, as a shell starts it; python is this interpreter."""
        words = [sys.executable if word == "python" else str(word) for word in command]
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def torchrun(self, processes: int, config: Path, *overrides: str) -> Result:
        """The caption recipe in several processes."""
        return self.shell(*self.torchrun_words(processes, config, *overrides))

    @staticmethod
    def torchrun_words(processes: int, config: Path, *overrides: str) -> list[str]:
        """The command line of `torchrun`."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return ["python", *launch, "-m", CAPTION, str(config), *overrides]

    def close(self) -> None:
        """No more commands."""
        self._writing.close()
        self._server.wait(timeout=30)


@contextmanager
def commands_in(scratch: Path, folder: Path = REPOSITORY, **own: str) -> Iterator[Commands]:
    """Commands that find the index of media in `scratch` and never ask the network; `own` is environment."""
    scratch.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {
        **kept,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VFT_CACHE": str(scratch / "cache"),
        **own,
    }
    commands = Commands(environment, scratch, folder)
    try:
        yield commands
    finally:
        commands.close()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder: Path, key: str) -> list[Any]:
    """One key of all lines."""
    return [line[key] for line in metrics(folder)]


def largest_difference(a: list[float], b: list[float]) -> float:
    """Relative, of two lists of equal length."""
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def _wait_for(file: Path) -> str:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()):
            return text
        time.sleep(0.01)
    raise TimeoutError(f"{file} did not appear within {TIMEOUT_S:g} s")
