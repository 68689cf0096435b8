"""Command lines, declared once: the fields of a pydantic model, with type, range, default and help."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vft.common.console import user_errors
from vft.common.errors import UserError, missing
from vft.config.command_line import Parser


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(missing(folder, "folder"))
    return folder


ExistingFolder = Annotated[Path, AfterValidator(_check_folder)]


def _find_adapter(folder: Path) -> Path:
    from vft.training.export import adapter_folder  # late: not every command takes an adapter

    return adapter_folder(_check_folder(folder))


AdapterFolder = Annotated[Path, AfterValidator(_find_adapter)]
"""Folder of an adapter, of a run that has one, or of a run's checkpoint."""


def _check_jsonl(file: Path) -> Path:
    if file.suffix.lower() in (".csv", ".tsv", ".tab", ".parquet", ".arrow", ".xlsx"):
        raise ValueError(f"is written as JSONL; name it {file.with_suffix('.jsonl')}")
    return file


JsonlFile = Annotated[Path, AfterValidator(_check_jsonl)]


FILE_SUFFIXES = {
    *(".csv", ".tsv", ".json", ".jsonl", ".txt", ".md", ".html", ".toml"),
    *(".parquet", ".zip", ".gguf", ".bin", ".safetensors"),
}
"""Of names that are meant for a file."""


def _check_new_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError("is a file; name a folder")
    if folder.suffix.lower() in FILE_SUFFIXES:
        raise ValueError(f"becomes a folder of files; name it {folder.with_suffix('')}")
    return folder


NewFolder = Annotated[Path, AfterValidator(_check_new_folder)]
"""Folder that a command writes."""


def written_as(suffix: str) -> AfterValidator:
    """A check that a file to write has the suffix of what is written."""

    def check(file: Path) -> Path:
        if file.suffix.lower() != suffix:
            raise ValueError(f"is written as {suffix[1:].upper()}; name it {file.with_suffix(suffix)}")
        return file

    return AfterValidator(check)


class Positional(str):
    """Marks the field of a positional argument, and is its name in the help."""


class Choices(tuple[str, ...]):
    """Marks a field that takes one of these texts."""


class Arguments(BaseModel):
    """The field `max_frames` is the option `--max-frames`; a bool is a flag, a list an option that can be repeated. The
    docstring under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, text: str | None, argv: Sequence[str] | None, prog: str | None) -> Self:
        """The arguments that were given. `text` describes the command, `prog` is its name in usage lines.

        Options may stand between positional arguments: `CONFIG.toml --adapter DIR train.max_steps=4`.
        UserError names the first argument that is wrong, its value and what is allowed.
        """
        parser = Parser(prog, text)
        shown = {}
        for key, field in cls.model_fields.items():
            name, is_list = field.alias or key, str(field.annotation).startswith("list")
            marks = {type(mark): mark for mark in field.metadata}
            choices = marks.get(Choices)
            text = " ".join((field.description or ", ".join(choices or ())).split()).replace("%", "%%")
            about: dict[str, Any] = {"help": text} if field.annotation is bool else {"help": text, "choices": choices}
            if Positional in marks:
                shown[name] = marks[Positional]
                nargs = None if not is_list else "+" if field.is_required() else "*"
                parser.add_argument(name, metavar=shown[name], nargs=nargs, **about)
                continue
            shown[name] = f"--{name.replace('_', '-')}"
            about |= {"default": argparse.SUPPRESS, "required": field.is_required()}
            if field.annotation is bool:
                about["action"] = "store_true"
            else:
                about |= {"action": "append" if is_list else "store", "metavar": None if choices else "VALUE"}
            parser.add_argument(shown[name], **about)
        try:
            return cls.model_validate({name: _at_home(value) for name, value in vars(parser.read(argv)).items()})
        except ValidationError as error:
            first = error.errors()[0]
            reason = str(first.get("ctx", {}).get("error", first["msg"])).replace("Input should be", "must be")
            if not first["loc"]:  # of several options: the reason names them
                raise UserError(reason) from None
            value = first["input"] if str(first["input"]).strip() else repr(first["input"])
            raise UserError(f"{shown[str(first['loc'][0])]} = {value}: {reason}") from None


def _at_home(value: Any) -> Any:
    """A value with a leading `~/` as the home folder, which a shell leaves in `--adapter=~/run`."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


class ConfigArguments(Arguments):
    """Those of a command about a training run."""

    config: Annotated[Path, Positional("CONFIG.toml")]
    """TOML file of a training run"""
    overrides: Annotated[list[str], Positional("section.key=value")] = Field(default_factory=list)
    """settings that replace those of the file"""


A = TypeVar("A", bound=Arguments)


def renamed(message: str, names: Mapping[str, str]) -> str:
    """A message with a command's options in the place of a configuration's keys."""
    for key, option in names.items():
        message = re.sub(rf"(?<![\w./]){re.escape(key)}\b(?!\.)", option, message)
    return message


def command(
    arguments: type[A], text: str | None, names: Mapping[str, str] | None = None
) -> Callable[[Callable[[A], None]], Callable[..., None]]:
    """Makes `main(argv, prog)` of a function of `arguments`. A UserError in it ends the command with one line, with the
    options in `names` in the place of keys."""

    def decorate(run: Callable[[A], None]) -> Callable[..., None]:
        def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
            with user_errors():
                try:
                    run(arguments.parse(text, argv, prog))
                except UserError as error:
                    error.args = (renamed(str(error), names or {}),)
                    raise

        return main

    return decorate
