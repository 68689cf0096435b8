"""All settings of a run: vft settings [SECTION]

Prints name, values, default and meaning of each, in Markdown, such as `vft settings train` for the table [train]. The
whole is docs/use/settings.md.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from vft.cli.arguments import Arguments, Positional, command
from vft.common.errors import UserError
from vft.config.run import Config

HEAD = """# All settings

Made by `vft settings`. A configuration is a TOML file of these tables. On the command line `train.max_steps=100`
replaces a value, and `data.video.fps=` takes it away. A name that is not here is refused, with the nearest one that is.
Where the default is empty, the setting is off or, as its text says, chosen by others.
"""
BOUNDS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "up to {}", "exclusiveMaximum": "below {}"}
KINDS = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}


class SettingsArguments(Arguments):
    """Arguments of `vft settings`."""

    section: Annotated[list[str], Positional("SECTION")] = Field(default_factory=list)
    """tables to print, such as train or data.video (default: all)"""


@command(SettingsArguments, __doc__)
def main(arguments: SettingsArguments) -> None:
    """Command line."""
    known = dict(sections())
    for name in arguments.section:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"no table [{name}]: {hint}there are {', '.join(filter(None, known))}")
    print("\n".join(known[name] for name in arguments.section) if arguments.section else page(), end="")


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(text for _, text in sections())])


def sections() -> Iterator[tuple[str, str]]:
    """Each table with its text: first what stands above all tables, under the name ""."""
    schema = Config.model_json_schema()
    yield from _tables("", schema, schema["$defs"])


def _tables(name: str, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rows, inner = [], []
    for key, field in schema["properties"].items():
        found = _table_in(field, defs)
        if found is None:
            default = "needed" if key in schema.get("required", ()) else _shown(field.get("default"))
            text = " ".join(field.get("description", "").split())
            rows.append([f"`{key}`", values(field, defs), default, text])
        else:
            is_list, table = found
            inner.append((f"{name}.{key}".lstrip("."), is_list, table))
    title = f"## `[{name}]`" if name else "## Above all tables"
    about = " ".join(schema.get("description", "").split()).removeprefix(f"`[{name}]`: ")
    lines = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    yield name, "\n".join([title, "", about, "", *lines, ""] if rows else [title, "", about, ""])
    for path, is_list, table in inner:
        for own, text in _tables(path, table, defs):
            yield own, text.replace(f"## `[{own}]`", f"## `[[{own}]]`") if is_list and own == path else text


def _table_in(field: Mapping[str, Any], defs: Mapping[str, Any]) -> tuple[bool, Mapping[str, Any]] | None:
    """The table, or list of tables, that a field holds."""
    for one in field.get("anyOf", [field]):
        items: Mapping[str, Any] = one.get("items", {})
        if "$ref" in one or "$ref" in items:
            return "$ref" in items, defs[(items or one)["$ref"].rpartition("/")[2]]
    return None


def values(field: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """What a field may hold, in words."""
    if "anyOf" in field:
        return " or ".join(values(one, defs) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(map(_shown, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        items: Mapping[str, Any] = field.get("items") or next(iter(field.get("prefixItems", [])), {})
        return f"list of: {values(items, defs)}"
    if field.get("type") == "object":
        return f"table of: {values(of, defs)}" if isinstance(of := field.get("additionalProperties"), dict) else "table"
    kind = "path" if field.get("format") == "path" else KINDS.get(field.get("type", ""), "any")
    bounds = [text.format(_shown(field[name])) for name, text in BOUNDS.items() if name in field]
    return " ".join([kind, *bounds])


def _shown(value: object) -> str:
    return "" if value in (None, [], {}) else json.dumps(value, ensure_ascii=False)
