"""The one way to fail: `UserError`."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the file, the field, the value and the mend.

    Commands print it without a traceback and exit with status 2. Of a host's processes the first one prints."""

    on_one_rank = False  # whether no other process has met it
