"""Settings as a form and as TOML. The text is the truth: a change in the form changes one key of it, and comments stay.

A value in the form is text: empty where the key is not set, a text without its quotes, else as TOML writes it.
"""

from __future__ import annotations

from typing import Any

import tomlkit

from vft.app import draft
from vft.common.errors import UserError
from vft.config.listing import Setting, Table, tables
from vft.config.toml import parse_value


def form_tables() -> list[Table]:
    """The tables that the form has: all but the lists of sources, which the tab Data makes."""
    return [table for table in tables() if table.settings and not table.is_list]


def form_settings() -> list[Setting]:
    """Their settings, in order."""
    return [setting for table in form_tables() for setting in table.settings]


def values_in(text: str) -> dict[str, str]:
    """Values of the form by key: those that are set. UserError if `text` is no TOML."""
    document, found = draft.tables(text), {}
    for setting in form_settings():
        node: Any = document
        for name in setting.key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        if node is not None:
            found[setting.key] = _shown(node)
    return found


def with_value(text: str, key: str, value: str) -> str:
    """The settings with one changed; an empty value takes it out. UserError if the one or the other is no TOML."""
    value = value.strip()
    return draft.changed(text, {key: parse_value(value, f"{key}={value}") if value else None})


def _shown(value: Any) -> str:
    if isinstance(value, str) and value and "\n" not in value and _meaning(value) == value:
        return value
    return tomlkit.item(value).as_string() if not isinstance(value, bool) else str(value).lower()


def _meaning(text: str) -> Any:
    """What a text in the form means; None if it is no value."""
    try:
        return parse_value(text.strip(), text)
    except UserError:
        return None
