"""The settings of the run that is being made, as TOML text: checked, and changed with comments and order kept."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import tomlkit

import vft
from vft.app.workspace import Workspace
from vft.common.errors import UserError
from vft.config import run as configs
from vft.config.run import Config

RECIPES = Path(vft.__file__).parents[1] / "recipes"
"""Where vft runs from its checkout, the configurations that it comes with; they may be read wherever they lie."""


def recipes(space: Workspace) -> dict[str, Path]:
    """Files to begin with, by the name under which they are shown: those in the chosen folders, then those of vft."""
    own = {str(file.relative_to(RECIPES.parent)): file for file in sorted(RECIPES.glob("*/*.toml"))}
    return {name: space.home / name for name in space.configurations() if name not in own} | own


def tables(text: str) -> dict[str, Any]:
    """The settings as plain tables. UserError if they are not TOML."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"settings: not TOML: {error}") from None


def checked(space: Workspace, text: str, overrides: Sequence[str] = (), needs_model: bool = True) -> Config:
    """The settings with `overrides` (`section.key=value`), valid and allowed in the page. UserError names the first
    that is not."""
    if not text.strip():
        raise UserError("settings: there are none yet; choose a recipe, or data in the tab Data")
    config = configs.load(tables(text), overrides)
    space.check(config, needs_model)
    return config


def changed(text: str, changes: Mapping[str, Any]) -> str:
    """The settings with other values, by dotted key (`data.root`); None takes a key out, so that its default holds.

    Comments stay. UserError if the text is not TOML, or a key lies in something that is no table.
    """
    wanted = tables(text)
    document = tomlkit.parse(text)
    for key, value in changes.items():
        _put(wanted, key, value)
        _put(document, key, _written(value))
    result = tomlkit.dumps(document)
    # tomlkit has had errors with tables that are spread over a file. Settings matter more than comments.
    return result if tables(result) == wanted else tomli_w.dumps(wanted)


def _put(table: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        if value is None and name not in table:
            return
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError(f"settings: {key}: {name} is no table")
    if value is None:
        table.pop(last, None)
    else:
        table[last] = value


def _written(value: Any) -> Any:
    """A value for tomlkit; tables in a list on a line each, as the recipes write sources."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return value
    rows = tomlkit.array()
    for one in value:
        row = tomlkit.inline_table()
        row.update(one)
        rows.append(row)
    return rows.multiline(len(value) > 1)
