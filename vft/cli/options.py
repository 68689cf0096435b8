"""Options of a command declared once: the fields of a pydantic model, with type, range, default and help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from vft.common.errors import UserError


def _check_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError("no such folder")
    return folder


ExistingFolder = Annotated[Path, AfterValidator(_check_folder)]


class Options(BaseModel):
    """The field `max_frames` is the option `--max-frames`, a list takes the positional arguments, a bool is a flag. The
    docstring under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add an option for each field. Values stay texts; `parse` converts them."""
        for field_name, field in cls.model_fields.items():
            name = field.alias or field_name
            text = " ".join((field.description or "").split()).replace("%", "%%")
            common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
            if field.annotation is bool:
                parser.add_argument(_option(name), action="store_true", **common)
            elif field.annotation == list[Path]:
                parser.add_argument(name, nargs="+", metavar=name.upper().removesuffix("S"), help=text)
            else:
                parser.add_argument(_option(name), metavar="VALUE", required=field.is_required(), **common)

    @classmethod
    def parse(cls, arguments: argparse.Namespace) -> Self:
        """The options that were given. UserError names the first that is wrong, its value and what is allowed."""
        try:
            return cls.model_validate(vars(arguments))
        except ValidationError as error:
            first = error.errors()[0]
            reason = str(first.get("ctx", {}).get("error", first["msg"])).replace("Input should be", "must be")
            if not first["loc"]:  # of several options: the reason names them
                raise UserError(reason) from None
            value = first["input"] if str(first["input"]).strip() else repr(first["input"])
            raise UserError(f"{_option(str(first['loc'][0]))} = {value}: {reason}") from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
