"""What all tables of a configuration share: the strict base class, types with ranges, checks of two settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def check_order(low_name: str, low: int, high_name: str, high: int) -> None:
    """Raise ValueError, with both numbers, if `low` is above `high`."""
    if low > high:
        raise ValueError(f"{low_name} = {low} is above {high_name} = {high}")


def contradiction(name: str, value: object, other: str, other_value: object, section: str) -> ValueError:
    """The error for two settings that exclude each other; it says how to remove one."""
    return ValueError(
        f"{name} = {value} and {other} = {other_value} contradict each other; keep one "
        f"(on the command line, {section}.{name}= takes it away)"
    )


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
