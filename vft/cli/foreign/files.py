"""The settings in a file for another trainer: YAML or JSON, or a shell script that calls it. Nothing in it is run.

Of a script these are understood: the shell's words, variables (`$NAME`, `${NAME:-value}`), lists (`"${NAME[@]}"`),
sums of whole numbers (`$(expr 16 / $n)`, `$((16 / n))`) and environment variables before the call; anything else of the
shell is not.
"""

from __future__ import annotations

import json
import operator
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vft.common.errors import UserError, missing

LLAMA_FACTORY, MS_SWIFT = "LLaMA-Factory", "ms-swift"
TABLES = (".yaml", ".yml", ".json")
MAX_CHARACTERS = 1_000_000
"""Longest file, and longest text after its variables are replaced."""
MAX_LINE = 2000
"""Most characters between `export` and a variable."""
V1 = {
    "train_dataset",
    "dist_config",
    "kernel_config",
    "quant_config",
    "peft_config",
    "sample_backend",
    "micro_batch_size",
}
"""Keys of LLaMA-Factory's other engine."""
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
QUOTED_OR_COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*")|(?:(?<=\s)|^)\#[^\n]*""", re.MULTILINE)
HERE_DOCUMENT = re.compile(r"(?<!<)<<-?[ \t]*(['\"]?)(\w+)\1")
ASSIGNMENT = re.compile(
    r"""(?:^|(?<=[\s;]))([A-Za-z_]\w*)(\+?)="""
    r"""(?:\(((?:[^()]|\([^()]*\))*)\)|((?:"[^"]*"|'[^']*'|\$\([^\n]{0,2000}\)|[^\s;"'])*))"""
)
VARIABLE = re.compile(r"\$\{(\w+):?[-=]([^}$]*)\}|\$\{(\w+)\}|\$(\w+)|\"?\$\{(\w+)\[[@*]\]\}\"?")
PATH = r"[^\s\0]*"
"""Within a word: the words of a command are joined by \\0."""
SUM = re.compile(r"\$\(\(([^()$]*)\)\)|\$\(\s*expr\s([^()$]*)\)")


class Foreign(NamedTuple):
    """What a file says."""

    tool: str
    """LLAMA_FACTORY or MS_SWIFT."""
    settings: dict[str, Any]
    """By the names there; environment variables are among them."""
    calls: int = 1
    """How many calls that train there are; the settings are those of the first."""


def read(file: Path) -> Foreign:
    """The settings in a file. UserError if it can't be read or trains nothing."""
    if file.suffix.lower() not in TABLES:
        return _read_script(file)
    settings = read_table(file)
    if V1 & settings.keys() and "dataset" not in settings:
        raise UserError(
            f"{file}: {min(V1 & settings.keys())} is of LLaMA-Factory's v1 engine, whose files are not read"
        )
    for tool, key in ((LLAMA_FACTORY, "model_name_or_path"), (MS_SWIFT, "model")):
        if settings.get(key):
            return Foreign(tool, settings)
    raise UserError(f"{file}: names no model: neither model_name_or_path (LLaMA-Factory) nor model (ms-swift)")


def read_table(file: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file. UserError if it can't be read or holds something else."""
    text = read_text(file)
    try:
        content = json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = file.suffix.upper().replace("YML", "YAML")
        raise UserError(f"{file}: not {kind[1:]}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{file}: holds no settings by name")
    environment = content.pop("ENV", None)  # ms-swift's way to set environment variables
    return {**environment, **content} if isinstance(environment, dict) else content


def read_text(file: Path) -> str:
    """The text of a file. UserError if it can't be read."""
    if not file.is_file():
        raise UserError(f"{file}: {missing(file, 'file')}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{file}: can't be read ({reason})") from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{file}: has {len(text):,} characters; settings have at most {MAX_CHARACTERS:,}")
    return text


def near(file: Path, name: str) -> Path | None:
    """The file that `file` calls `name`: relative to the current folder, else to one that `file` is in."""
    return next((path for folder in (Path(), *file.parents) if os.path.isfile(path := folder / name)), None)


def _read_script(file: Path) -> Foreign:
    text = _without_here_documents(read_text(file))
    text = QUOTED_OR_COMMENT.sub(lambda match: match[1] or "", text)
    text = re.sub(r"\\\r?\n", " ", text)
    variables: dict[str, str] = {}
    exported: dict[str, Any] = {}
    for match in ASSIGNMENT.finditer(text):
        name, sign, list_, value = match.groups()
        # The words of a list keep their quotes.
        value = re.sub(r""""([^"]*)"|'([^']*)'""", r"\1\2", value) if list_ is None else " ".join(list_.split())
        value = _expand(file, value, variables)
        before = variables.get(name, "") + ("" if list_ is None else " ") if sign else ""
        variables[name] = before + value
        line = text[max(match.start() - MAX_LINE, text.rfind("\n", 0, match.start()) + 1) : match.start()]
        exported |= {name: variables[name]} if re.search(r"\bexport\s[^;&]*$", line) else {}
    text = _expand(file, text, variables)
    try:
        calls = [call for words in _commands(text) if (call := _call(file, words))]
    except ValueError as error:
        raise UserError(f"{file}: not a shell script: {error}") from error
    if not calls:
        read = "`swift sft`, `swift rlhf` and `llamafactory-cli train` are, `swift pt` and Megatron's are not"
        raise UserError(f"{file}: nothing in it trains by a call that is read; {read}")
    tool, settings = calls[0]
    return Foreign(tool, exported | settings, len(calls))


def _without_here_documents(text: str) -> str:
    """The text without what commands read from it."""
    lines, kept, end = text.split("\n"), [], ""
    ends = {line.strip() for line in lines}
    for line in lines:
        if end:
            end = "" if line.strip() == end else end
            continue
        begin = HERE_DOCUMENT.search(line)
        end = begin[2] if begin and begin[2] in ends else ""
        kept.append(line[: begin.start()] + line[begin.end() :] if end and begin else line)
    return "\n".join(kept)


def _expand(file: Path, text: str, variables: dict[str, str]) -> str:
    """The text with the values of variables that are known, and of sums."""
    for _ in range(4):  # a default may name others
        before = text
        text = VARIABLE.sub(lambda match: _value(match, variables), text)
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"{file}: its variables make more than {MAX_CHARACTERS:,} characters")
        if text == before:
            break
    return SUM.sub(lambda match: _sum(match, variables), text)


def _value(match: re.Match[str], variables: dict[str, str]) -> str:
    """The value of a variable, else its default, else the text as it is."""
    default = match[0] if match[2] is None else match[2]
    return variables.get(next(filter(None, (match[1], match[3], match[4], match[5]))), default)


def _sum(match: re.Match[str], variables: dict[str, str]) -> str:
    """The value of a sum of whole numbers, from left to right; the text as it is if it is anything else."""
    words = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), match[1] or match[2])
    if not re.fullmatch(r"\s*\d{1,9}(\s*\\?[*/+-]\s*[1-9]\d{0,8})*\s*", words):
        return match[0]
    total, *rest = re.findall(r"\d+|[*/+-]", words)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        total = OPERATORS[sign](int(total), int(number))
    return str(total)


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if word.strip(";&|\n") or not word:  # an empty text in quotes is a word
            words.append(word)
        else:
            yield words
            words = []


def _call(file: Path, words: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """The trainer that a command calls, and the settings; None if it calls none."""
    line = "\0".join(words)
    match = re.search(rf"(?:^|\0)(?:{PATH}/)?(swift\0|{PATH}swift/cli/)(sft|rlhf)(?:\.py)?(?=\0|$)", line)
    factory = re.search(rf"(?:^|\0)(?:{PATH}/)?(?:(?:llamafactory-cli|lmf)\0train|src/train\.py)(?=\0|$)", line)
    found = match or factory
    if found is None or line.startswith(("echo\0", "megatron\0")):
        return None
    before, after = line[: found.start()].split("\0"), line[found.end() :].strip("\0").split("\0")
    settings: dict[str, Any] = {"rlhf_type": "dpo"} if match and match[2] == "rlhf" else {}
    settings |= dict(word.split("=", 1) for word in before if re.match(r"[A-Za-z_]\w*=", word))
    settings |= _launch(file, _options(before))
    if after[0].lower().endswith(TABLES):
        table = near(file, name := after.pop(0))
        if table is None:
            raise UserError(f"{file}: {name}: no such file; name that file, or run this where it is found")
        settings |= read_table(table)
    return MS_SWIFT if match else LLAMA_FACTORY, settings | _options(after)


def _launch(file: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Processes and hosts, and the configuration of Accelerate, as torchrun, Accelerate and DeepSpeed are told them."""
    name = options.get("config_file")
    table = near(file, name) if isinstance(name, str) else None
    options = (read_table(table) if table else {}) | options
    found: dict[str, Any] = {key: options[key] for key in ("config_file", "hostfile", "include") if key in options}
    for key in ("num_processes", "num_gpus", "nproc_per_node", "nnodes"):  # num_processes is of all hosts
        value = options.get(key)
        if isinstance(value, int) or (isinstance(value, str) and re.match(r"\d+$|\$", value)):
            found["NNODES" if key == "nnodes" else "NPROC_PER_NODE"] = value
    return found


def _options(words: Sequence[str]) -> dict[str, Any]:
    """`--name value ...`, `--name=value` and `name=value` by name. Without a value it is true; with several, a list."""
    found: dict[str, list[str]] = {}
    key = ""
    for word in words:
        if re.match(r"\d?>", word):  # output goes to a file
            break
        option = re.match(r"(--?(?=[A-Za-z]))?([A-Za-z][\w-]*)(=?)(.*)", word, re.DOTALL)
        if option and (option[1] or (option[3] and not key)):
            key = option[2].replace("-", "_")
            found[key] = [option[4]] if option[3] else []
            key = key if option[1] else ""
        elif key:
            found[key].append(word)
    return {name: values[0] if len(values) == 1 else values or True for name, values in found.items()}
