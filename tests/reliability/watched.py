"""A command whose use of pickle, of torch.load and of planted code is written to the file WATCH_LOG; tests start it.

`watched.py PROGRAM ARGUMENTS...`, a module or a script. What processes send each other is pickled in memory, and
allowed: files are looked for.
"""

from __future__ import annotations

import io
import os
import pickle
import runpy
import sys
from typing import Any

import torch

PLANTED = "hostile_code"
"""Name of the module that must not be imported."""
PAYLOAD = "mkdir"
"""Name of the function that a planted pickle calls."""


def note(what: str) -> None:
    """Added at once: a process may end without a word."""
    with open(os.environ["WATCH_LOG"], "a") as file:
        file.write(f"{what}\n")


def heard(event: str, arguments: tuple[Any, ...]) -> None:
    """Of Python's audit events those that tell."""
    if event == "pickle.find_class" and arguments[1] == PAYLOAD:
        note(f"unpickled {arguments[0]}.{arguments[1]}")
    elif event == "import" and PLANTED in str(arguments[0]):
        note(f"imported {arguments[0]}")


class Unpickler(pickle.Unpickler):
    """Takes note where it reads a file rather than bytes in memory."""

    def __init__(self, file: Any, **options: Any) -> None:
        if not isinstance(file, io.BytesIO):
            note(f"unpickles {getattr(file, 'name', file)}")
        super().__init__(file, **options)


def load(file: Any, **options: Any) -> Any:
    """In the place of pickle.load."""
    return Unpickler(file, **options).load()


def torch_load(file: Any, *arguments: Any, **options: Any) -> Any:
    """In the place of torch.load, which nothing needs."""
    note(f"torch.load of {file}")
    raise RuntimeError("torch.load")


if __name__ == "__main__":
    sys.addaudithook(heard)
    pickle.Unpickler, pickle.load = Unpickler, load  # type: ignore[misc]
    torch.load = torch.serialization.load = torch_load
    program, sys.argv = sys.argv[1], sys.argv[1:]
    if program.endswith(".py"):
        sys.path[0] = os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
