"""What all commands do alike on a terminal: how they end on a user's mistake, how they show progress."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from vft.types import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr (of one process a host) and exit status 2; Ctrl-C into status 130."""
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if error.on_one_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}" if rank == "0" else f"error: rank {rank}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def progress_bar(total: int, what: str, unit: str, show: bool = True) -> tqdm[Any]:
    """A bar for work of more than two seconds; where nobody watches (a log file) a line every ten."""
    interval_s = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=what, unit=unit, delay=2.0, disable=not show, mininterval=interval_s)
