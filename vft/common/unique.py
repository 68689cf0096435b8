"""Names that may repeat, told apart by numbers: `x`, `x#2`, `x#3`."""

from __future__ import annotations

from collections.abc import Iterable


def unique_name(name: str, seen: dict[str, int]) -> str:
    """`name`, or `name#2`, `name#3`, ... if it is among the `seen` names. Adds the result to them."""
    unique = name
    while unique in seen:
        seen[name] += 1
        unique = f"{name}#{seen[name]}"
    seen[unique] = 1
    return unique


def unique_names(names: Iterable[str]) -> list[str]:
    """All of `names`, in order, each different from the others."""
    seen: dict[str, int] = {}
    return [unique_name(name, seen) for name in names]
