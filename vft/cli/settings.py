"""All settings of a run: vft settings [SECTION]

Prints name, values, default and meaning of each, in Markdown, such as `vft settings train` for the table [train]. The
whole is docs/use/settings.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from vft.cli.arguments import Arguments, Positional, command
from vft.common.errors import UserError, did_you_mean
from vft.config.listing import shown, tables

HEAD = """# All settings

Made by `vft settings`. A configuration is a TOML file of these tables. On the command line `train.max_steps=100`
replaces a value, and `data.video.fps=` takes it away. A name that is not here is refused, with the nearest one that is.
Where the default is empty, the setting is off or, as its text says, chosen by others.
"""


class SettingsArguments(Arguments):
    """Arguments of `vft settings`."""

    section: Annotated[list[str], Positional("SECTION")] = Field(default_factory=list)
    """tables to print, such as train or data.video (default: all)"""


@command(SettingsArguments, __doc__)
def main(arguments: SettingsArguments) -> None:
    """Command line."""
    known = dict(sections())
    for name in arguments.section:
        if name not in known:
            last = name.rpartition(".")[2]
            homes = [table.name for table in tables() if last in [setting.name for setting in table.settings]]
            hint = f"`vft settings {homes[0]}` has {last}; " if homes else did_you_mean(name, known)
            raise UserError(f"no table [{name}]: {hint}there are {', '.join(filter(None, known))}")
    print("\n".join(known[name] for name in arguments.section) if arguments.section else page(), end="")


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(text for _, text in sections())])


def sections() -> Iterator[tuple[str, str]]:
    """Each table with its text: first what stands above all tables, under the name ""."""
    for table in tables():
        title = "Above all tables"
        if table.name:
            title = f"`[[{table.name}]]`" if table.is_list else f"`[{table.name}]`"
        lines = [f"## {title}", "", table.about, ""]
        if table.settings:
            lines += ["| setting | values | default | meaning |", "|---|---|---|---|"]
        for one in table.settings:
            cells = [f"`{one.name}`", one.values, "needed" if one.is_needed else shown(one.default), one.meaning]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        yield table.name, "\n".join([*lines, ""] if table.settings else lines)
