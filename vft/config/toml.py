"""Strict TOML: what all tables of a configuration share, and the reader of a file with overrides. Errors are one line.

Settings that had another name in earlier versions are still read under it, with a warning.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vft.common.errors import UserError, missing

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=BaseModel)

RENAMED = {
    "data.clip_deadline_s": "data.decode_timeout_s",
    "parallel.tower_checkpointing": "parallel.vision_checkpointing",
    "train.tower_learning_rates": "train.component_learning_rates",
}
"""Dotted keys: the old name and the new one."""
RENAMED_COMPONENTS = {"vision_tower": "vision_encoder", "merger": "projector"}
"""Components of a model, as they appear in the settings of `NAME_COMPONENTS`: the old name and the new one."""
NAME_COMPONENTS = ("model.train", "lora.targets", "lora.ranks", "lora.alphas", "train.component_learning_rates")
"""Settings that are lists of components, or of patterns that start with a component, or tables with such keys."""
_PACKS = (
    "train.packs_per_step, the rows of at most data.pack_tokens tokens in a step of all processes together "
    "(single samples with data.max_samples_per_pack=1)"
)
COUNTERPARTS = {
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"), _PACKS),
    **dict.fromkeys(("cutoff_len", "max_length", "max_seq_length", "model_max_length"), "data.pack_tokens"),
    **dict.fromkeys(("target_modules", "lora_target"), "lora.targets"),
    **{"r": "lora.rank", "lora_r": "lora.rank", "lora_rank": "lora.rank", "lora_alpha": "lora.alpha"},
    **{"lr": "train.learning_rate", "lr_scheduler_type": "train.schedule", "num_train_epochs": "train.epochs"},
    **{"bf16": "train.precision", "gradient_checkpointing": "parallel.activation_checkpointing"},
    **{"save_steps": "checkpoint.every_steps", "save_total_limit": "checkpoint.keep_last"},
    **{"eval_steps": "eval.every_steps", "model_name_or_path": "model.path"},
}
"""What settings of other trainers are called here."""
MAX_LINE = 1000
"""Longest error message, in characters."""
_REASONS = {
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "model_type": "must be a table",
    "path_type": "must be a string",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
}
"""pydantic's error types in the words of TOML. For others its own message is used."""


# -------------------------------------------------------------------------------------------- what tables share


def check_order(low_name: str, low: int, high_name: str, high: int) -> None:
    """Raise ValueError, with both numbers, if `low` is above `high`."""
    if low > high:
        raise ValueError(f"{low_name} = {low} is above {high_name} = {high}")


def contradiction(name: str, value: object, other: str, other_value: object, section: str) -> ValueError:
    """The error for two settings that exclude each other; it says how to keep either."""
    return ValueError(
        f"{name} = {value} and {other} = {other_value} contradict each other; keep one "
        f"(on the command line, {section}.{other}= keeps {name}, and {section}.{name}= keeps {other})"
    )


def matching(pattern: str, allowed: str) -> AfterValidator:
    """A check that a text matches the whole `pattern`. `allowed` says in words what does."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must {allowed}")
        return text

    return AfterValidator(check)


def expand(folder: Path) -> Path:
    """`folder` with a leading `~` as the home folder."""
    # Not Path.expanduser: it raises an error if there is no such user.
    return Path(os.path.expanduser(folder))


Item = TypeVar("Item")
Folder = Annotated[Path, Field(strict=False), AfterValidator(expand)]
# TOML has lists, frozen objects need tuples. Only the sequence is converted; its items are checked strictly.
Tuple = Annotated[tuple[Item, ...], Field(strict=False)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A table of the file: frozen, without unknown keys, without conversion of types except int to float."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


# ------------------------------------------------------------------------------------------------------ reading


def load(model: type[_Model], source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> _Model:
    """Read the TOML file `source`, or take its tables, lay `overrides` over it and check the whole against `model`.

    An override is `section.key=value`, the value in TOML, where a plain word needs no quotes
    (`train.schedule=linear`). Entries of lists are reached by their number (`data.sources.0.path=a.jsonl`). An empty
    value removes the key, so that its default holds (`data.video.fps=`).

    Raises UserError, one line: where it was written, the key, the value, what is allowed.
    """
    try:
        return _load(model, source, overrides)
    except UserError as error:  # a key may hold line breaks
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(error))
        raise UserError(line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 3]}...") from error.__cause__


def _load(model: type[_Model], source: Path | Mapping[str, Any], overrides: Sequence[str]) -> _Model:
    path = source if isinstance(source, Path) else "configuration"
    table = _read(source) if isinstance(source, Path) else deepcopy(dict(source))
    lines = list(_rename(table))
    overridden = [_override(table, text) for text in overrides]
    lines += _rename(table)
    for line in lines:
        logger.warning("%s: %s", path, line)
    try:
        return model.model_validate(table)
    except ValidationError as error:
        key, message = explain(model, error)
        where = str(path)
        if covers(overridden, key):
            where = "command line"
        elif any(k.startswith(f"{key}." if key else "") for k in overridden):  # either may be the cause
            where = f"{path} and command line"
        raise UserError(f"{where}: {message}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not TOML: byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or nested too deeply
        raise UserError(f"{path}: not TOML: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: {missing(path, 'file')}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def covers(keys: Collection[str], key: str) -> bool:
    """Whether the dotted `key`, or a section that contains it, is among `keys`."""
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def show(value: Any) -> str:
    """A value nearly as TOML writes it, for a message: one line, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # too many digits, too deep
        text = f"({type(value).__name__})"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _new_key(key: str) -> str:
    """The current name of a dotted key."""
    for old, new in RENAMED.items():
        if covers([old], key):
            return new + key.removeprefix(old)
    for table in NAME_COMPONENTS:
        if key.startswith(f"{table}."):
            return f"{table}.{_new_component(key.removeprefix(f'{table}.'))}"
    return key


def _new_component(pattern: Any) -> Any:
    """The current name of a component, or of a pattern that starts with one. What is no text stays as it is."""
    if not isinstance(pattern, str):
        return pattern
    first, dot, rest = pattern.partition(".")
    return f"{RENAMED_COMPONENTS.get(first, first)}{dot}{rest}"


def _rename(table: dict[str, Any]) -> Iterator[str]:
    """Replace old names in a whole configuration, in place. Yields a message for each.

    If a key is given under both names, both stay: the check of the settings then rejects the old one.
    """
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        inside, new_name = table.get(section), new.rpartition(".")[2]
        if isinstance(inside, dict) and name in inside and new_name not in inside:
            inside[new_name] = inside.pop(name)
            yield f"{old} is called {new} now"
    for setting in NAME_COMPONENTS:
        section, _, name = setting.rpartition(".")
        inside = table.get(section)
        value = inside.get(name) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and isinstance(value, list | dict):
            new_names = [_new_component(one) for one in value]
            inside[name] = dict(zip(new_names, value.values(), strict=True)) if isinstance(value, dict) else new_names
            for one, new in zip(value, new_names, strict=True):
                if new != one:
                    yield f"{setting}: {one} is called {new} now"


def _override(table: dict[str, Any], text: str) -> str:
    """Apply the override `text` to `table`. Returns its dotted key."""
    key, equals, value_text = text.partition("=")
    names = _new_key(key.strip()).split(".")
    if not equals or not all(names):
        raise UserError(f"command line: {text}: an override is section.key=value")
    value_text = value_text.strip()
    node: Any = table
    for depth, name in enumerate(names):
        where = ".".join(names[:depth])
        slot: Any = name
        if isinstance(node, list):
            if not name.isdecimal() or int(name) >= len(node):
                raise UserError(f"command line: {text}: {where} has {len(node)} entries, counted from 0; no {name}")
            slot = int(name)
        elif not isinstance(node, dict):
            raise UserError(f"command line: {text}: {where} = {show(node)} is not a table")
        elif name not in node and not value_text:
            break  # nothing to remove
        if depth < len(names) - 1:
            node = node.setdefault(slot, {}) if isinstance(node, dict) else node[slot]
        elif value_text:
            node[slot] = parse_value(value_text, text)
        else:
            del node[slot]
    return ".".join(names)


def parse_value(value_text: str, text: str) -> Any:
    """The value of an override. A text that is no TOML is a string, or if it is `[WORD, ...]` a list of strings, unless
    it starts like a string, list or table."""
    try:
        parsed = tomllib.loads(f"value = {value_text}")
    except (ValueError, RecursionError) as error:
        if re.fullmatch(r"\[\s*[\w.*-]+(\s*,\s*[\w.*-]+)*\s*\]", value_text):  # a shell has taken the quotes away
            return re.split(r"\s*,\s*", value_text[1:-1].strip())
        if value_text[0] in "\"'[{":
            raise UserError(f"command line: {text}: not a TOML value: {error}") from error
        return value_text
    # A line break in the text may add other keys: then the whole text is the value.
    return parsed["value"] if len(parsed) == 1 else value_text


def validated(model: type[_Model], table: Mapping[str, Any], message: str) -> _Model:
    """`table` checked against `model`. UserError with `message`, in which `{}` is what `explain` says."""
    try:
        return model.model_validate(table)
    except ValidationError as error:
        raise UserError(message.format(explain(model, error)[1])) from error


def explain(model: type[BaseModel], invalid: ValidationError) -> tuple[str, str]:
    """The dotted key of pydantic's error, and a message of one line: key, value, what is allowed."""
    # Of a misspelt key, report that it is unknown, not that the right one is missing.
    error = min(invalid.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")  # how pydantic marks a wrong key of a table
    if error["type"] == "missing":
        return key, f"{key}: missing"
    if error["type"] == "extra_forbidden":
        is_table = isinstance(error["input"], dict)
        name = f"[{key}]" if is_table else f"{key} = {show(error['input'])}"
        return key, f"{name}: unknown {'section' if is_table else 'key'}{_suggest(model, error['loc'])}"
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        if isinstance(error["input"], dict):  # the reason names the settings
            return key, f"{key}: {reason}" if key else reason
        return key, f"{key} = {show(error['input'])}: {reason}"
    reason = _REASONS.get(error["type"], error["msg"].replace("Input should be", "must be"))
    if error["type"] == "tuple_type" and isinstance(error["input"], str):
        item = show(error["input"])
        if key.endswith("sources"):
            item = f'{{format = "messages", path = {item}}}'
        reason += f", such as {key} = [{item}]"
    return key, f"{key} = {show(error['input'])}: {reason}"


def _suggest(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What an unknown key may mean: a similar name in its section, the same name in another one, or all names."""
    *parents, wrong = [part for part in loc if isinstance(part, str)]
    section = model
    for name in parents:
        section = _section_in(section.model_fields[name].annotation) or section
    if wrong in COUNTERPARTS:
        return f"; here it is {COUNTERPARTS[wrong]}"
    close = difflib.get_close_matches(wrong, section.model_fields, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    elsewhere = [key for key in _keys(model) if key.rpartition(".")[2] == wrong]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; known here: {', '.join(section.model_fields)}"


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: the type itself, an optional one, or the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a section and of its subsections."""
    keys: list[str] = []
    for name, info in section.model_fields.items():
        inner = _section_in(info.annotation)
        keys += _keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys
