"""What the command lines of all commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path


def parse_arguments(
    text: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    argv: Sequence[str] | None,
    prog: str | None,
) -> argparse.Namespace:
    """Arguments of a command. `text` is its description, `prog` its name in usage lines (None: of the script).

    Options may stand between positional arguments: `CONFIG.toml --adapter DIR train.max_steps=4`.
    """
    parser = argparse.ArgumentParser(prog=prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser.parse_intermixed_args(argv)


def add_config_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The configuration file of a run, and settings that replace the file's."""
    parser.add_argument("config", type=Path, nargs="?" if optional else None, help="TOML file of a training run")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file"
    )
