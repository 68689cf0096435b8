"""Configurations of other trainers as ours: vft config import FILE [--output run.toml]

FILE is a YAML of LLaMA-Factory, a YAML or JSON of ms-swift, or a shell script that calls `swift sft`, `swift rlhf` or
`llamafactory-cli train`. Nothing in it is run. Each line says from which key it came; what has no counterpart is listed
at the end, and on the terminal, with the reason.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vft.cli.arguments import Arguments, Choices, Positional, command
from vft.cli.foreign.draft import Draft
from vft.cli.foreign.files import read
from vft.cli.foreign.settings import convert
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.config import run

SECTIONS = (
    *("", "model", "lora", "data", "data.sources", "data.video", "data.image", "train", "objective", "parallel"),
    *("checkpoint", "eval", "eval.sources", "log"),
)


class ConfigArguments(Arguments):
    """Arguments of `vft config`."""

    action: Annotated[str, Positional("ACTION"), Choices(("import",))]
    """what to do: import"""
    file: Annotated[Path, Positional("FILE")]
    """configuration or command of LLaMA-Factory or ms-swift"""
    output: Path | None = None
    """TOML file to write; without it the text is printed"""
    gpus: Annotated[int, Field(ge=1)] | None = None
    """GPUs of the run, by which batch sizes are multiplied; without it those that FILE names, else 1"""


@command(ConfigArguments, __doc__)
def main(arguments: ConfigArguments) -> None:
    """Command line."""
    output = arguments.output
    if output is not None and output.exists():
        raise UserError(f"{output}: exists; choose another name, or delete it")
    try:
        draft = convert(read(arguments.file), arguments.file, arguments.gpus)
        text = to_toml(draft)
        run.load(tomllib.loads(text))
    except UserError as error:  # the checks of a configuration do not know where it is from
        where = "" if str(error).startswith(str(arguments.file)) else f"{arguments.file}: as our "
        raise UserError(one_line(f"{where}{error}")) from error
    for line in draft.lost:
        print(one_line(f"not taken over: {line}"), file=sys.stderr)
    if output is None:
        print(text, end="")
    else:
        replace_text(output, text)
        lost = ", with what is not taken over at its end" if draft.lost else ""
        print(f"wrote {output}{lost}; next: vft doctor {output}")
        print(f"then: vft train TASK {output}, TASK being {' or '.join(run.TASKS)}: what answers are scored by")


def to_toml(draft: Draft) -> str:
    """The file: each line with its origin, then what is not taken over."""
    tables: dict[tuple[int, str, str], list[str]] = {}
    for key, (value, origin) in draft.lines.items():
        table, _, name = key.rpartition(".")
        section, _, number = table.rpartition(".") if table[-1:].isdecimal() else (table, "", "")
        line = one_line(f"{name} = {toml_value(value)}  # {origin}")
        tables.setdefault((SECTIONS.index(section), section, number), []).append(line)
    lines = [one_line(f"# Made of {draft.file.name}, a configuration of {draft.tool}, by vft config import.")]
    for (_, section, number), inside in sorted(tables.items(), key=lambda item: (item[0][0], int(item[0][2] or 0))):
        lines += ["", f"[[{section}]]" if number else f"[{section}]"] if section else [""]
        lines += inside
    lines += ["", "# Not taken over, with the reason:", *(one_line(f"# {line}") for line in draft.lost)]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{toml_value(key)} = {toml_value(one)}' for key, one in value.items())} }}"
    # JSON's texts, numbers and lists are TOML's, but for control characters above 0x1f.
    text = json.dumps("" if value is None else value, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)


def one_line(text: str) -> str:
    """The text with its line breaks and other control characters written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
