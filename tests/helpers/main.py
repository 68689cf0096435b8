"""A command run within the test's own process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.runs.commands import Result


def run_main(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """`main` with its arguments: exit status, stdout and stderr."""
    status: object = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code or 0
    assert isinstance(status, int), status
    return Result(status, *capsys.readouterr())
