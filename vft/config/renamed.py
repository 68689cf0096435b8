"""Settings that had another name in earlier versions. The old names are still read, with a warning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

KEYS = {
    "data.clip_deadline_s": "data.decode_timeout_s",
    "parallel.tower_checkpointing": "parallel.vision_checkpointing",
    "train.tower_learning_rates": "train.component_learning_rates",
}
"""Dotted keys: the old name and the new one."""
COMPONENTS = {"vision_tower": "vision_encoder", "merger": "projector"}
"""Components of a model, as they appear in the settings of `LISTED` and `KEYED`: the old name and the new one."""
LISTED = ("model.train", "lora.targets")
"""Settings that are lists of components, or of patterns that start with a component."""
KEYED = ("lora.ranks", "lora.alphas", "train.component_learning_rates")
"""Settings that are tables with such keys."""


def new_key(key: str) -> str:
    """The current name of a dotted key."""
    for old, new in KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    for table in KEYED:
        if key.startswith(f"{table}."):
            return f"{table}.{new_component(key.removeprefix(f'{table}.'))}"
    return key


def new_component(pattern: str) -> str:
    """The current name of a component, or of a pattern that starts with one."""
    first, dot, rest = pattern.partition(".")
    return f"{COMPONENTS.get(first, first)}{dot}{rest}"


def rename(table: dict[str, Any]) -> Iterator[str]:
    """Replace old names in a whole configuration, in place. Yields a message for each.

    If a key is given under both names, both stay: the check of the settings then rejects the old one.
    """
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
