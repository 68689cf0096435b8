"""A shell as a reader of the documentation has it: a fresh bash that knows no more than PATH and HOME.

`tools/setup` finds its .venv made. `python` and `vft` in there hand their command over to a process that has the
imports done (`commands.py`). `torchrun` starts from nothing, and so does `vft settings`, which imports little.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.runs.commands import REPOSITORY, TIMEOUT_S, Commands, Result

STAND_INS = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
"""No hub; a CPU, which other tests use too."""
PAGE_TIMEOUT_S = 900.0
SHORT = {"make_data.py": ["--train", "32", "--held-out", "4", "--processes", "1"]}
"""What follows the arguments of a script that would take long."""
SHIM = """#!{python} -IS
import json, os, sys, tempfile, time

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
real = {python!r}
if name == "torchrun":
    os.execv(real, [real, "-m", "torch.distributed.run", *words])
if name == "vft" and words[:1] == ["settings"]:
    os.execv(real, [real, {vft!r}, *words])
if name == "vft":
    program = "vft.cli.main"
elif words[0] == "-m":
    program, *words = words[1:]
elif words[0].endswith(".py"):
    program, *words = words
    words += {short}.get(os.path.basename(program), [])
else:
    os.execv(real, [real, *words])
folder = tempfile.mkdtemp(dir={scratch!r})
with open(os.path.join(folder, "stdin"), "wb") as file:
    file.write(sys.stdin.buffer.read())
request = {{"program": program, "arguments": words, "folder": folder, "cwd": os.getcwd()}}
with open({requests!r}, "w") as file:
    file.write(json.dumps({{**request, "environment": dict(os.environ)}}) + "\\n")
while not os.path.exists(os.path.join(folder, "status")):
    time.sleep(0.01)
for stream in ("stdout", "stderr"):
    getattr(sys, stream).write(open(os.path.join(folder, stream), errors="replace").read())
status = int(open(os.path.join(folder, "status")).read())
sys.exit(status if status >= 0 else 128 - status)
"""


class Shell:
    """Runs lines in the folder of a checkout."""

    def __init__(self, checkout: Path, environment: dict[str, str]) -> None:
        self.checkout, self.environment = checkout, environment

    def run(self, *lines: str) -> Result:
        """The lines, one after another in one bash, up to the first that fails: the last line of stderr names it."""
        script = [f"{line}\n[ $? = 0 ] || {{ echo {shlex.quote(f'failed: {line}')} >&2; exit 1; }}" for line in lines]
        words = ["bash", "--noprofile", "--norc", "-c", "\n".join(script)]
        done = subprocess.run(
            words,
            cwd=self.checkout,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PAGE_TIMEOUT_S,
        )
        return Result(done.returncode, done.stdout, done.stderr)


@contextmanager
def shell_in(home: Path, checkout: Path) -> Iterator[Shell]:
    """A shell in `checkout`, a folder with the tools and the recipes, which gets a .venv; `home` is its HOME."""
    scratch = home / "scratch"
    scratch.mkdir()
    venv.create(checkout / ".venv", with_pip=False, symlinks=True)
    # The Python of which tools/setup would make .venv, and the system's commands.
    path = f"{Path(sys.base_prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(home), **STAND_INS}
    if "PYTHONPATH" in os.environ:  # tests of another checkout than the installed one
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    commands = Commands(environment, scratch, checkout)
    shim = SHIM.format(
        python=sys.executable,
        vft=str(Path(sys.executable).parent / "vft"),
        short=SHORT,
        scratch=str(scratch),
        requests=str(commands.requests),
    )
    for name in ("python", "vft", "torchrun"):
        file = checkout / ".venv" / "bin" / name
        file.unlink(missing_ok=True)
        file.write_text(shim)
        file.chmod(0o755)
    _stamp(checkout, environment)
    try:
        yield Shell(checkout, environment)
    finally:
        commands.close()


def _stamp(checkout: Path, environment: dict[str, str]) -> None:
    """Says to tools/setup that .venv is up to date, by its own function."""
    text = (REPOSITORY / "tools" / "setup").read_text()
    function = re.search(r"^fingerprint\(\) \{[\s\S]*?^\}$", text, re.MULTILINE)
    assert function
    script = f"python=.venv/bin/python\n{function[0]}\nfingerprint >.venv/setup-stamp"
    subprocess.run(["bash", "-c", script], cwd=checkout, env=environment, check=True, timeout=TIMEOUT_S)
