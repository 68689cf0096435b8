"""What all commands do alike on a terminal: how they end on a user's mistake, how they show progress."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vft.common.errors import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr (of one process a host) and exit status 2; Ctrl-C into status 130, and
    another signal into its own."""
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if error.on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(str(stop) or "interrupted", file=sys.stderr)
        sys.exit(getattr(stop, "status", 130))


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_show: Callable[[str], None] | None = None


def show_bars_in(view: Callable[[str], None] | None) -> None:
    """From now on a progress bar is a line given to `view`, again and again; None: on the terminal."""
    global _show
    _show = view


class _Line(io.StringIO):
    """A file of a bar's: takes each of its states for the line."""

    def write(self, text: str) -> int:
        if _show is not None:
            _show(text.strip())
        return len(text)


def progress_bar(total: int, what: str, unit: str, show: bool = True) -> tqdm[Any]:
    """A bar for work of more than two seconds; where nobody watches (a log file) a line every ten."""
    interval_s = 0.1 if sys.stderr.isatty() else 10.0
    file = _Line() if _show is not None else None
    return tqdm(total=total, desc=what, unit=unit, delay=2.0, disable=not show, mininterval=interval_s, file=file)
