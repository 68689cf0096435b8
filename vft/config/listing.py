"""All settings of a run as a list: what each may hold, its default and meaning, as the configuration declares them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vft.config.run import Config

BOUNDS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "up to {}", "exclusiveMaximum": "below {}"}
KINDS = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting."""

    key: str
    """Dotted, such as `train.max_steps`."""
    values: str
    """What it may hold, in words."""
    choices: tuple[str, ...]
    """All that it may hold, as TOML writes it but for the quotes of texts; empty if these are not a few."""
    default: Any
    is_needed: bool
    """Whether it has no default."""
    meaning: str

    @property
    def name(self) -> str:
        """The key within its table."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of settings."""

    name: str
    """Dotted, such as `data.video`; empty for what stands above all tables."""
    is_list: bool
    """Whether it is one of `[[name]]`."""
    about: str
    settings: tuple[Setting, ...]


def tables() -> Iterator[Table]:
    """All tables in the order of a file, each before those in it."""
    schema = Config.model_json_schema()
    yield from _tables("", False, schema, schema["$defs"])


def _tables(name: str, is_list: bool, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Iterator[Table]:
    settings, inner = [], []
    for key, field in schema["properties"].items():
        dotted = f"{name}.{key}".lstrip(".")
        found = _table_in(field, defs)
        if found is not None:
            inner.append((dotted, *found))
            continue
        is_needed = key in schema.get("required", ())
        text = " ".join(field.get("description", "").split())
        setting = Setting(dotted, values(field, defs), choices(field), field.get("default"), is_needed, text)
        settings.append(setting)
    about = " ".join(schema.get("description", "").split()).removeprefix(f"`[{name}]`: ")
    yield Table(name, is_list, about, tuple(settings))
    for dotted, is_inner_list, table in inner:
        yield from _tables(dotted, is_inner_list, table, defs)


def _table_in(field: Mapping[str, Any], defs: Mapping[str, Any]) -> tuple[bool, Mapping[str, Any]] | None:
    """The table, or list of tables, that a field holds."""
    for one in field.get("anyOf", [field]):
        items: Mapping[str, Any] = one.get("items", {})
        if "$ref" in one or "$ref" in items:
            return "$ref" in items, defs[(items or one)["$ref"].rpartition("/")[2]]
    return None


def choices(field: Mapping[str, Any]) -> tuple[str, ...]:
    """All that a field of the JSON schema may hold; empty if these are not a few."""
    found: list[str] = []
    for one in field.get("anyOf", [field]):
        if one.get("type") == "boolean" and "const" not in one:
            found += ["true", "false"]
        elif "enum" in one or "const" in one:
            allowed = one.get("enum", [one.get("const")])
            found += [value if isinstance(value, str) else shown(value) for value in allowed]
        elif one.get("type") != "null":
            return ()
    return tuple(found)


def values(field: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    """What a field of the JSON schema may hold, in words."""
    if "anyOf" in field:
        return " or ".join(values(one, defs) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(map(shown, field.get("enum", [field.get("const")])))
    if field.get("type") == "array":
        items: Mapping[str, Any] = field.get("items") or next(iter(field.get("prefixItems", [])), {})
        return f"list of: {values(items, defs)}"
    if field.get("type") == "object":
        return f"table of: {values(of, defs)}" if isinstance(of := field.get("additionalProperties"), dict) else "table"
    kind = "path" if field.get("format") == "path" else KINDS.get(field.get("type", ""), "any")
    bounds = [text.format(shown(field[name])) for name, text in BOUNDS.items() if name in field]
    return " ".join([kind, *bounds])


def shown(value: object) -> str:
    """A value as TOML writes it; nothing for what is not set."""
    return "" if value in (None, [], {}) else json.dumps(value, ensure_ascii=False)
