"""How vft fails because of its user: `UserError`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

MAX_NAMES = 10_000
"""Of a folder, among which a misspelt name is looked for."""


class UserError(ValueError):
    """A mistake that the user can fix. Its message is one line: file, field, value, and how to fix it.

    Commands print the message without a traceback and exit with status 2. One process of each host prints it.
    """

    def __init__(self, message: str, *, on_one_rank: bool = False) -> None:
        super().__init__(message)
        self.on_one_rank = on_one_rank
        """Whether no other process has met the error, so that this one must print it, whatever its rank."""


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`did you mean 'NAME'? `: the nearest to `word`, whatever its case, `-` and `_`; "" if none is near."""
    plain = {re.sub(r"[\W_]", "", name.casefold()): name for name in names}
    close = difflib.get_close_matches(re.sub(r"[\W_]", "", word.casefold()), plain, n=1)
    return f"did you mean {plain[close[0]]!r}? " if close else ""


def missing(path: str | Path, kind: str, fix: str = "") -> str:
    """Why `path` is not the `kind` that is asked for, `file` or `folder`: for a message, in which it follows the path.

    It names what is there with a similar name; else the first folder of the path that is not there, and `fix`.
    """
    if re.search(r"(^|/)(https?|s3|gs):/", str(path)):
        return f"is an address of the network; download it, and name the {kind} here"
    fix = f"; {fix}" if fix else ""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        fix = f"; name the folder that holds it, {path.parent}"
    if path.exists():
        return f"is a {'folder' if path.is_dir() else 'file'}, not a {kind}{fix}"
    steps = [path, *path.parents]
    place = next((number for number, step in enumerate(steps) if os.path.lexists(step)), 0)
    if place == 0:
        return f"is a link that leads nowhere{fix}"
    there, gone = steps[place], steps[place - 1]
    if not there.is_dir():
        return f"no such {kind}: {there} is no folder{fix}"
    names: list[str] = []
    with suppress(OSError), os.scandir(there) as entries:
        names = [entry.name for entry in islice(entries, MAX_NAMES)]
    if close := difflib.get_close_matches(gone.name, names, n=1):
        near = there / close[0]
        whole = near / path.relative_to(gone)
        return f"no such {kind}; did you mean {str(whole if whole.exists() else near)!r}?"
    return f"no such {kind}{fix}" if gone == path else f"no such {kind}: there is no folder {gone}{fix}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without a number or place in code; without a message, its type's name."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]
