"""How every command ends on a user's mistake: one line, no traceback, exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vft.types import UserError


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a UserError into one line on stderr (of the first process alone) and exit status 2."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
