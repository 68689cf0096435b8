"""How vft fails because of its user: `UserError`."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can fix. Its message is one line: file, field, value, and how to fix it.

    Commands print the message without a traceback and exit with status 2. One process of each host prints it.
    """

    def __init__(self, message: str, *, on_one_rank: bool = False) -> None:
        super().__init__(message)
        self.on_one_rank = on_one_rank
        """Whether no other process has met the error, so that this one must print it, whatever its rank."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a number or place in code; without a message, its type's name."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]
