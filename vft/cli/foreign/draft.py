"""Our settings as they are found in those of another trainer, and what has no counterpart."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from vft.cli.foreign.files import Foreign
from vft.common.errors import UserError
from vft.config.toml import OTHER_TRAINERS as TABLES
from vft.config.toml import reason_elsewhere, show


class Draft:
    """Our settings, as they are found, with where each is from; and what has no counterpart.

    Args:
        foreign: The settings elsewhere; what is taken of them is not asked for again.
        file: Where they are from.
    """

    def __init__(self, foreign: Foreign, file: Path) -> None:
        self.tool, self.file = foreign.tool, file
        self.rest = {name: plain(value) for name, value in foreign.settings.items()}
        self.defaults = TABLES["defaults"]["shared"] | TABLES["defaults"][self.tool]
        self.lines: dict[str, tuple[Any, str]] = {}
        """Value and origin, by dotted key."""
        self.lost: list[str] = []
        if foreign.calls > 1:
            self.lost.append(f"{foreign.calls - 1} more calls in {file.name}: only the first is imported")

    def take(self, *names: str) -> tuple[Any, str]:
        """The value of the first of these names that is given, and where it is from; else of a default, else None."""
        for name in names:
            self.check(name)
            if (value := self.rest.pop(name, None)) not in (None, []):
                return value, f"{name}: {shown(name, value)}"
        name = next((name for name in names if name in self.defaults), "")
        return self.defaults.get(name), f"{self.tool}'s default of {name}"

    def check(self, name: str) -> None:
        """UserError if the value has a variable of the shell that the file does not set."""
        value = self.rest.get(name)
        if is_open(value):
            raise UserError(f"{self.file}: {name} = {show(value)}: is not set in the file; write its value there")

    def number(self, *names: str) -> tuple[Any, str]:
        """As `take`. UserError if it is no number."""
        value, origin = self.take(*names)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{self.file}: {origin}: must be a number")
        return value, origin

    def text(self, name: str) -> tuple[str, str]:
        """As `take`. UserError if it is no text; "" if it is not given."""
        value, origin = self.take(name)
        if not isinstance(value or "", str):
            raise UserError(f"{self.file}: {origin}: must be a text")
        return value or "", origin

    def table(self, name: str) -> tuple[dict[str, Any], str]:
        """As `take`. UserError if it is no table, nor one as JSON; an empty one if it is not given."""
        value, origin = self.take(name)
        try:
            return dict(json.loads(value) if isinstance(value, str) else value or {}), origin
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.file}: {origin}: must be a table of names") from error

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set our `key`."""
        self.lines[key] = (value, origin)

    def lose(self, what: str, reason: str) -> None:
        """List what is not taken over: its name with its value, as `take` gives them."""
        self.lost.append(f"{what}: {reason}")


def plain(value: Any) -> Any:
    """A number or truth value that is written as text, and a whole number that is written as 3.0, as what they are."""
    if isinstance(value, list):
        return [part for one in value if (part := plain(one)) is not None]
    if isinstance(value, str) and (word := value.strip().lower()) in ("true", "false", "none", "null", ""):
        return {"true": True, "false": False}.get(word)
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", value.strip()):
        value = float(value) if re.search(r"[.eE]", value) else int(value[:20])
    if isinstance(value, float):
        return int(value) if value.is_integer() else value if math.isfinite(value) else str(value)
    return value


def reason_of(name: str) -> str:
    """Why a setting without a counterpart is not taken over."""
    unknown = "of the environment: set it for vft, too, if it is to hold" if name.isupper() else "has no counterpart"
    return reason_elsewhere(name) or unknown


def shown(name: str, value: Any) -> str:
    """A value for a comment, short; not if it is a secret or a table."""
    if re.search(r"(_token|key|secret|password|webhook_url)$", name.lower()):
        return "(not shown)"
    return "(a table)" if any(isinstance(part, dict | list) for part in _parts(value)) else show(value)


def is_open(value: Any) -> bool:
    """Whether a value has a variable or command of the shell in it."""
    return any(isinstance(part, str) and re.search(r"\$[\w({]", part) for part in _parts(value))


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def as_list(value: Any) -> list[Any]:
    """A list as it is, a text cut at its commas, nothing as an empty list."""
    if isinstance(value, str):
        return [part for one in value.split(",") if (part := one.strip())]
    return value if isinstance(value, list) else [] if value is None else [value]
