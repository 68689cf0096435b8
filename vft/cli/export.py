"""Write the adapter (or whole model) of a checkpoint: vft export RUN [--step N] [--output DIR] [section.key=value ...]

For a run that was stopped, or for an earlier step than its last. Nothing is trained; an adapter takes its own memory.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vft.cli.arguments import Arguments, ExistingFolder, NewFolder, Positional, command
from vft.training.export import export_run


class ExportArguments(Arguments):
    """Arguments of `vft export`."""

    run: Annotated[ExistingFolder, Positional("RUN")]
    """output_dir of a run"""
    step: int | None = None
    """step of the checkpoint (default: the newest whole one)"""
    output: NewFolder | None = None
    """new folder to write (default: RUN/adapter or RUN/model; with --step RUN/exports/step-N)"""
    overrides: Annotated[list[str], Positional("section.key=value")] = Field(default_factory=list)
    """settings that have changed since, such as model.path=BASE for a base that was moved"""


@command(ExportArguments, __doc__)
def main(arguments: ExportArguments) -> None:
    """Command line."""
    print(export_run(arguments.run, arguments.step, arguments.output, arguments.overrides))
