"""What all commands share on a terminal: messages, progress bars, and how they end after a user's mistake."""

from __future__ import annotations

import gc
import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table
from tqdm import tqdm

from vft.common.errors import UserError

logger = logging.getLogger(__name__)


@cache
def stderr_console() -> Console:
    """Where messages, tables of a run and the live view go. Whatever is printed here appears above the live view.

    It is made when first used: rich looks at the terminal only then.
    """
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], justify: JustifyMethod = "left"
) -> Table:
    """A table for a terminal. `justify` is for all columns but the first."""
    table = Table(title=title)
    for number, name in enumerate(columns):
        table.add_column(name, justify=justify if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table) -> None:
    """Print a table to stdout. Brackets and colons in it are text."""
    Console(markup=False, emoji=False).print(table)


_PREFIXES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}


class _MessageHandler(logging.Handler):
    """Prints a record as one plain line on stderr: `warning: ...`, `error: ...`, and INFO as it is.

    INFO and WARNING come from the main process alone, unless the record has `extra={"all_ranks": True}`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        is_main = os.environ.get("RANK", "0") == "0"
        return bool(super().filter(record)) and (
            is_main or record.levelno >= logging.ERROR or getattr(record, "all_ranks", False)
        )

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{_PREFIXES.get(record.levelno, '')}{self.format(record)}"
            with tqdm.external_write_mode(file=sys.stderr):  # progress bars make room, and come back below
                stderr_console().print(text, soft_wrap=True)
        except Exception:
            self.handleError(record)


def setup_logging() -> None:
    """Show vft's messages on stderr. Commands call it through `user_errors`; a second call changes nothing."""
    vft = logging.getLogger("vft")
    if not any(isinstance(handler, _MessageHandler) for handler in vft.handlers):
        vft.addHandler(_MessageHandler())
    vft.setLevel(logging.INFO)


@contextmanager
def user_errors() -> Iterator[None]:
    """Set up the messages of a command, and turn a UserError into one line on stderr and exit status 2.

    Of each host's processes one prints the line. Ctrl-C gives status 130, another signal its own, and a pipe whose
    reader has gone that of SIGPIPE.
    """
    setup_logging()
    gc.freeze()  # what is imported stays: no collection need look at it, least of all the one at the end
    is_first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if error.on_one_rank or is_first_of_host:
            logger.error("%s%s", "" if rank == "0" else f"rank {rank}: ", error)
        sys.exit(2)
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not any(event & select.POLLERR for _, event in output.poll(0)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be written has no reader
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        if is_first_of_host:
            logger.info("%s", str(stop) or "interrupted", extra={"all_ranks": True})
        sys.exit(getattr(stop, "status", 130))


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
