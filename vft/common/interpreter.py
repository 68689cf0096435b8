"""A Python that lacks vft's packages: the checkout's .venv takes over, or a message says what to do.

Only the standard library is imported here, and nothing newer than Python 3.7.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds the package; in a checkout also tools/ and .venv/."""
RERUN = "VFT_RERUN_IN_VENV"
"""Set in the environment of a process that `run_in_venv` started, so that it does not start another."""
OLD_PYTHON = tuple(sys.version_info) < (3, 11)


def prefer_venv() -> None:
    """If this Python is too old or has no torch, replace the process by the same command in the checkout's .venv.

    Ends with a message if the Python is too old and there is no .venv.
    """
    if OLD_PYTHON or find_spec("torch") is None:
        run_in_venv()
    if OLD_PYTHON:
        fail(f"vft needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. {how_to_install()}")


def require_packages() -> None:
    """For `python -m vft.recipes.NAME`: the .venv takes over, or the process ends with a line that says what to do."""
    prefer_venv()
    if any(word.startswith("vft.recipes") for word in sys.orig_argv):
        if find_spec("torch") is None:
            report_missing(ModuleNotFoundError(name="torch"))
        quiet_interrupts(True)  # `vft.distributed.signals` takes over


def quiet_interrupts(quiet: bool) -> None:
    """Whether Ctrl-C ends the process without a word, instead of a traceback through whatever is being imported."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL if quiet else signal.default_int_handler)


def run_in_venv() -> None:
    """Replace this process by the same command in the Python of the checkout's .venv. Returns if there is no .venv, or
    if it is the Python that runs now."""
    venv = CHECKOUT / ".venv"
    python = venv / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != venv.resolve() and RERUN not in os.environ:
        # While Python looks for the module of `python -m`, argv[0] is "-m"; orig_argv has its name.
        words = sys.orig_argv[1:] if sys.argv[0] == "-m" else sys.argv
        os.execve(str(python), [str(python), *words], {**os.environ, RERUN: "1"})


def report_missing(error: ModuleNotFoundError) -> NoReturn:
    """End with a line about the package that an import did not find. A missing module of vft is raised again."""
    if error.name is None or error.name.partition(".")[0] == "vft":
        raise error
    fail(f"{sys.executable} lacks the package {error.name!r}. {how_to_install()}")


def how_to_install() -> str:
    """One sentence: how to get the packages."""
    setup = CHECKOUT / "tools" / "setup"
    if setup.is_file():
        return f"Run {setup} once; after that this command finds them by itself."
    return "Install vft with its packages: pip install PATH_TO_VFT"


def fail(message: str) -> NoReturn:
    """End with `message` on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
