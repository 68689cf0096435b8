"""Names of settings that earlier versions had: still read, with a line that gives the new name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

KEYS = {
    "data.clip_deadline_s": "data.decode_timeout_s",
    "parallel.tower_checkpointing": "parallel.vision_checkpointing",
    "train.tower_learning_rates": "train.component_learning_rates",
}
"""Dotted keys, old to new."""
COMPONENTS = {"vision_tower": "vision_encoder", "merger": "projector"}
"""Components of a model, in the keys of `LISTED` and `KEYED`, old to new."""
LISTED = ("model.train", "lora.targets")
"""Settings that are lists of components, or of patterns that begin with one."""
KEYED = ("lora.ranks", "lora.alphas", "train.component_learning_rates")
"""Settings that are tables with such keys."""


def new_key(key: str) -> str:
    """The name that a dotted key has now; `key` itself where it has kept its name."""
    for old, new in KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    for table in KEYED:
        if key.startswith(f"{table}."):
            return f"{table}.{new_component(key.removeprefix(f'{table}.'))}"
    return key


def new_component(pattern: str) -> str:
    """The name of a component, or a pattern that begins with one, as it is now."""
    first, dot, rest = pattern.partition(".")
    return f"{COMPONENTS.get(first, first)}{dot}{rest}"


def rename(table: dict[str, Any]) -> Iterator[str]:
    """Change old names in a whole configuration, in place; yields a line for each. A key that is there under both
    names is left alone: the check of the settings then refuses the old one."""
    for old, new in KEYS.items():
        section, _, name = old.rpartition(".")
        inside = table.get(section)
        new_name = new.rpartition(".")[2]
        if isinstance(inside, dict) and name in inside and new_name not in inside:
            inside[new_name] = inside.pop(name)
            yield f"{old} is called {new} now"
    for setting in (*LISTED, *KEYED):
        section, _, name = setting.rpartition(".")
        inside = table.get(section)
        value = inside.get(name) if isinstance(inside, dict) else None
        old_names = [one for one in value if isinstance(one, str)] if isinstance(value, list | dict) else []
        for one in [one for one in old_names if new_component(one) != one]:
            yield f"{setting}: {one} is called {new_component(one)} now"
        if isinstance(inside, dict) and isinstance(value, list):
            inside[name] = [new_component(one) if isinstance(one, str) else one for one in value]
        elif isinstance(inside, dict) and isinstance(value, dict):
            inside[name] = {new_component(key): one for key, one in value.items()}
