"""Strict TOML: what all tables of a configuration share, and the reader of a file with overrides. Errors are one line.

Settings that had another name in earlier versions are still read under it, with a warning.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

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
OTHER_TRAINERS: dict[str, dict[str, Any]] = tomllib.loads(
    Path(__file__).with_name("other_trainers.toml").read_text(encoding="utf-8")
)
"""What other trainers call their settings; the file says it table by table."""
REASONS_ELSEWHERE, MORE_REASONS = (
    {name: why for why, names in OTHER_TRAINERS[table].items() for name in names.split()}
    for table in ("reasons", "more_reasons")
)
"""Why settings of other trainers have no counterpart, by name or by how names begin (`galore_*`)."""
_PACKS = (
    "train.packs_per_step, the rows of at most data.pack_tokens tokens in a step of all processes together "
    "(single samples with data.max_samples_per_pack=1)"
)
_SOURCES = 'data.sources, such as [{format = "messages", path = "train.jsonl"}]'
COUNTERPARTS = {
    **{
        name: ours
        for ours, names in OTHER_TRAINERS["names"].items()
        for name in names.split()
        if name != ours.rpartition(".")[2]
    },
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "train_batch_size", "micro_batch_size"), _PACKS),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "global_batch_size"), _PACKS),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "seq_len", "model_max_length"), "data.pack_tokens"),
    **dict.fromkeys(("target_modules", "lora_target"), "lora.targets"),
    **{"r": "lora.rank", "lora_r": "lora.rank", "init_lora_weights": "lora.init", "init_weights": "lora.init"},
    **{"lr": "train.learning_rate", "lr_scheduler_type": "train.schedule", "num_train_epochs": "train.epochs"},
    **dict.fromkeys(("bf16", "torch_dtype", "dtype"), "train.precision"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2"), "train.betas, a list of two"),
    **dict.fromkeys(("gradient_checkpointing", "recompute"), "parallel.activation_checkpointing"),
    **{"save_steps": "checkpoint.every_steps", "eval_steps": "eval.every_steps"},
    **dict.fromkeys(("val_size", "test_size", "val_split", "split_dataset_ratio"), "eval.split"),
    **dict.fromkeys(("eval_dataset", "val_dataset", "val_file"), "eval.sources"),
    **{"early_stopping_patience": "eval.patience", "report_to": "log.wandb, log.tensorboard"},
    **dict.fromkeys(("model_name", "model_id", "base_model", "model.name"), "model.path"),
    **dict.fromkeys(("quantization_bit", "quant_bits", "load_in_4bit"), "model.quantize"),
    **dict.fromkeys(("dataset", "data_path", "train_file", "train_data", "data.path", "data.train"), _SOURCES),
    **dict.fromkeys(("dataset_dir", "media_dir", "video_folder", "image_folder"), "data.root"),
    **dict.fromkeys(("num_frames", "nframes"), "data.video.frames"),
    **dict.fromkeys(("resolution", "video_resolution", "data.video.height"), "data.video.max_pixels, height x width"),
    **{"num_workers": "data.workers", "data.image.size": "data.image.max_pixels, height x width"},
    **{"data.sources.max_samples": 'data.sources.0.take, such as "first:100"'},
    **dict.fromkeys(("stage", "rlhf_type", "objective.type", "objective.loss"), "objective.kind"),
}
"""What settings of other trainers are called here. A dotted name is what it is mistaken for in one table."""
MAX_LINE = 1000
"""Longest error message, in characters."""
_REASONS = {
    "bool_type": "must be true or false",
    "dict_type": "must be a table",
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
        section = (message.startswith(f"{key}: missing") and key.rpartition(".")[0]) or key
        if covers(overridden, key):
            where = "command line"
        elif any(k.startswith(f"{section}." if section else "") for k in overridden):  # either may be the cause
            where = f"{path} and command line"
        raise UserError(f"{where}: {message}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        is_foreign = path.suffix.lower() in (".yaml", ".yml", ".json", ".sh")
        fix = f"; `vft config import {path}` reads LLaMA-Factory's and ms-swift's" if is_foreign else ""
        raise UserError(f"{path}: not TOML: {error}{fix}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not TOML: byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or nested too deeply
        raise UserError(f"{path}: not TOML: {error}") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        inside = path / "config.toml"
        fix = f"name {inside}" if inside.is_file() else ""
        raise UserError(f"{path}: {missing(path, 'file', fix)}") from error
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
                near = "" if name.isdecimal() else f"; did you mean {'.'.join([where, '0', *names[depth:]])}?"
                raise UserError(
                    f"command line: {text}: {where} has {len(node)} entries, counted from 0; no {name}{near}"
                )
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
    """The value of an override. A text that is no TOML is a string, unless it starts like a string, list or table; in
    lists and tables words need no quotes, because a shell takes them away."""
    try:
        parsed = tomllib.loads(f"value = {value_text}")
    except (ValueError, RecursionError) as error:
        if value_text[0] not in "\"'[{":
            return value_text
        try:
            return tomllib.loads(f"value = {_BARE_WORD.sub(_quoted, value_text)}")["value"]
        except (ValueError, RecursionError):
            fix = f"""texts need "", and the whole '' for the shell: '{text.partition("=")[0]}=["a", "b"]'"""
            raise UserError(f"command line: {text}: not a TOML value: {error}; {fix}") from error
    # A line break in the text may add other keys: then the whole text is the value.
    return parsed["value"] if len(parsed) == 1 else value_text


_BARE_WORD = re.compile(r"(?<=[\[,=])\s*([^\s\[\]{},=\"']+)(?=\s*[,\]}])")
"""A value of a list or table that has no quotes."""


def _quoted(word: re.Match[str]) -> str:
    """A value with quotes, if it is none without."""
    value = parse_value(word[1], word[1])
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else word[0]


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
    section, field = _place(model, error["loc"])
    # Of a setting of several types pydantic reports each, and names it after the key.
    same = [e for e in invalid.errors() if e["loc"][:-1] == error["loc"][:-1]]
    whole = _place(model, error["loc"][:-1])[1]
    is_union = field is None and whole is not None and get_origin(whole.annotation) in (Union, UnionType)
    is_union = is_union and error["type"] != "extra_forbidden"
    loc = error["loc"][:-1] if is_union else error["loc"]
    key = ".".join(str(part) for part in loc if part != "[key]")  # how pydantic marks a wrong key of a table
    if error["type"] == "missing":
        about = ((field and field.description) or "").partition(". ")[0].replace("\n", " ").rstrip(".")
        return key, f"{key}: missing{f'; {about}' if about else ''}"
    if error["type"] == "extra_forbidden":
        is_table = isinstance(error["input"], dict)
        name = f"[{key}]" if is_table else f"{key} = {show(error['input'])}"
        return key, f"{name}: unknown {'section' if is_table else 'key'}{_suggest(model, error['loc'])}"
    if error["type"] == "value_error" and isinstance(error["input"], dict):  # the reason names the settings
        reason = str(error["ctx"]["error"])
        return key, f"{key}: {reason}" if key else reason
    reasons = [_reason(e) for e in (same if is_union else [error])]
    reason = ", or ".join([reasons[0], *(one.removeprefix("must be ") for one in reasons[1:])])
    if error["type"] == "tuple_type":
        reason += _as_list(key, error["input"], field)
    if error["type"] == "model_type":
        reason += _as_section(key, error["input"], _section_in(field.annotation) if field else section)
    return key, f"{key} = {show(error['input'])}: {reason}"


def _reason(error: ErrorDetails) -> str:
    """What is allowed, by pydantic's error, and for a number in another spelling the one of TOML."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    reason = _REASONS.get(error["type"], error["msg"].replace("Input should be", "must be"))
    is_whole = error["type"] in ("int_type", "int_from_float")
    meant = _number(error["input"], is_whole) if is_whole or error["type"] == "float_type" else None
    return reason if meant is None else f"{reason}; write {meant:g}" if not is_whole else f"{reason}; write {meant}"


def _number(value: Any, is_whole: bool) -> float | None:
    """The number that a value is meant to be: `5%`, `.5`, `1e3` for a whole one, `224x224`; None if that is unclear."""
    text = str(value).strip().replace("\N{MINUS SIGN}", "-") if isinstance(value, str | float) else ""
    if sides := re.fullmatch(r"(\d{1,5})\s*[x*\N{MULTIPLICATION SIGN}]\s*(\d{1,5})", text):
        return int(sides[1]) * int(sides[2]) if is_whole else None
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        return float(text.replace(",", "")) if not is_whole else int(text.replace(",", ""))
    try:
        number = float(text.removesuffix("%").replace(",", ".")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return number if not is_whole else int(number) if number.is_integer() else None


def _as_list(key: str, value: Any, field: FieldInfo | None) -> str:
    """How to write what is no list as one; or what is wrong with its entries, too."""
    if key.endswith("sources"):
        path = show(value) if isinstance(value, str) else '"train.jsonl"'
        return f', such as {key} = [{{format = "messages", path = {path}}}]'
    words = re.split(r"\s*[, ]\s*", value.strip("()[] ")) if isinstance(value, str) else [value]
    items = [parse_value(word, word) if isinstance(word, str) and word else word for word in words]
    try:
        kind: Any = Annotated[field.annotation, *field.metadata] if field else Any
        TypeAdapter(kind).validate_python(items)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":  # of two
            return f", such as {key} = {show(field.default)}" if field and field.default else ", with two entries"
        return f", and of its entries {show(first['input'])} {_reason(first)}"
    return f", such as {key} = {show(items)}"


def _as_section(key: str, value: Any, section: type[BaseModel] | None) -> str:
    """How to set what is in a table."""
    if key.rpartition(".")[2].isdecimal():
        return f', such as {{format = "messages", path = {show(value)}}}' if isinstance(value, str) else ""
    if value is False or str(value).lower() in ("none", "null", "no", "off"):
        return f"; {key}= takes it out"
    return f"; its settings are {', '.join(f'{key}.{name}' for name in section.model_fields)}" if section else ""


def _suggest(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """What an unknown key may mean: a similar name in its section, the same name in another one, or all names."""
    *parents, wrong = [part for part in loc if isinstance(part, str)]
    section, _ = _place(model, loc)
    found = COUNTERPARTS.get(".".join([*parents, wrong])) or COUNTERPARTS.get(wrong)
    if found:
        return f"; here it is {found}"
    elsewhere = [key for key in keys(model) if key.rpartition(".")[2] == wrong]
    close = difflib.get_close_matches(wrong, section.model_fields, n=1)
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    if why := (REASONS_ELSEWHERE | MORE_REASONS).get(wrong):
        return f"; there is none here: {why}"
    if close:
        return f"; did you mean {close[0]}?"
    if why := reason_elsewhere(wrong):
        return f"; there is none here: {why}"
    return f"; known here: {', '.join(section.model_fields)}"


def reason_elsewhere(name: str) -> str:
    """Why a setting of another trainer has no counterpart; "" if that is not known."""
    parts = name.split("_")
    names = [name, *("_".join(parts[:n]) + "_*" for n in range(len(parts) - 1, 0, -1))]
    return next((REASONS_ELSEWHERE[one] for one in names if one in REASONS_ELSEWHERE), "")


def _place(model: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[type[BaseModel], FieldInfo | None]:
    """The innermost section on the way to a setting, and its field; None if that is no field of a section."""
    section, field = model, None
    for part in loc:
        if isinstance(part, int):
            continue
        if field is not None and (inner := _section_in(field.annotation)):
            section = inner
        field = section.model_fields.get(part)
        if field is None:
            break
    return section, field


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: the type itself, an optional one, or the items of a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a section and of its subsections."""
    found: list[str] = []
    for name, info in section.model_fields.items():
        inner = _section_in(info.annotation)
        entry = "0." if name == "sources" else ""
        found += keys(inner, f"{prefix}{name}.{entry}") if inner else [f"{prefix}{name}"]
    return found
