"""Get a public data set: vft download SET [--root data] [--part NAME ...] [--yes]

Without --yes it prints what would be fetched, its size, the free disk space and the licence, and stops. With --yes it
fetches what is on the Hugging Face hub; the same command again goes on where it stopped. For what is elsewhere it
prints the steps. docs/use/data.md says how each set is read, docs/use/benchmarks.md how a benchmark is scored.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vft.cli.arguments import Arguments, Choices, NewFolder, Positional, command
from vft.cli.public_sets import SETS, Part
from vft.common.errors import UserError, first_line


def free_bytes(folder: Path) -> int:
    """Free space on the disk where `folder` is or would be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def fetch(parts: Mapping[str, Part], folder: Path, page: str) -> None:
    """Download parts. Files that are there already are not fetched again.

    UserError if the hub cannot be reached or refuses, if no file matches, or if the disk is too small.
    """
    planned = {name: _snapshot(name, part, folder, page, dry_run=True) for name, part in parts.items()}
    for name, files in planned.items():
        if not files:
            found = f"{parts[name].repository} has no files {', '.join(parts[name].patterns)}"
            raise UserError(f"--part {name}: {found}; look at {page} for what they are called now")
    needed = sum(file.file_size for files in planned.values() for file in files if file.will_download)
    free = free_bytes(folder)
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:,.1f} GB are to be fetched and {free / 1e9:,.1f} GB are free; free space, name "
            "another --root, or fewer parts with --part"
        )
    print(f"fetching {needed / 1e9:,.2f} GB", flush=True)
    for name, part in parts.items():
        _snapshot(name, part, folder, page, dry_run=False)


def _snapshot(name: str, part: Part, folder: Path, page: str, dry_run: bool) -> Any:
    from huggingface_hub import snapshot_download  # takes half a second, which --help need not wait for

    try:
        # A dry run fails if the hub cannot be reached; a real one would return what is on the disk as if it were all.
        return snapshot_download(
            part.repository,
            repo_type=part.kind,
            allow_patterns=list(part.patterns),
            local_dir=folder / part.folder,
            dry_run=dry_run,
        )
    except Exception as error:  # those of the hub's client, its network library and the disk have no class in common
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{part.repository}: {name} can't be fetched ({reason}); check the network and whether {page} asks you to "
            "log in (`hf auth login`), then run the same command again: it goes on where it stopped"
        ) from error


class DownloadArguments(Arguments):
    """Arguments of `vft download`."""

    set: Annotated[str, Positional("SET"), Choices(SETS)]
    root: NewFolder = Path("data")
    """folder of all data sets, data.root of the configurations (default data)"""
    part: list[str] = Field(default_factory=list)
    """fetch this part alone; can be repeated"""
    yes: bool = False
    """fetch; without it nothing is fetched"""


@command(DownloadArguments, __doc__)
def main(arguments: DownloadArguments) -> None:
    """Command line."""
    dataset = SETS[arguments.set]
    folder = arguments.root / dataset.folder
    for name in arguments.part:
        if name not in dataset.parts:
            known = ", ".join(dataset.parts) or "none: it is not on the hub"
            raise UserError(f"--part {name}: {dataset.folder} has no such part; its parts are {known}")
    parts = {name: dataset.parts[name] for name in arguments.part or dataset.parts}
    known_gb = 0.0 if arguments.part else dataset.gb
    known_gb = known_gb or sum(part.gb for part in parts.values())
    size = f"about {known_gb:,.4g} GB" if known_gb else "see the set's page"
    print(f"{dataset.folder}: {dataset.page}")
    print(f"licence: {dataset.licence}")
    print(f"goes to {folder}; size: {size}, free there: {free_bytes(folder) / 1e9:,.1f} GB")
    for name, part in parts.items():
        size = f"  about {part.gb:g} GB" if part.gb else ""
        print(f"  --part {name:24} {part.repository}: {', '.join(part.patterns)}{size}", flush=True)
    if arguments.yes and parts:
        fetch(parts, folder, dataset.page)
    elif parts:
        print("Nothing has been fetched; with --yes the parts above are.")
    if dataset.steps:
        print(f"{'Then' if parts else 'By hand'}, in {folder} unless it is a command of tools/:")
        print("\n".join(f"  {step.format(root=arguments.root)}" for step in dataset.steps))
    if dataset.source:
        print(f'In a configuration with data.root = "{arguments.root}": sources = [{dataset.source}]')
    for name in dataset.benchmarks:
        print(f"To score a model: vft benchmark {name} --model MODEL --root {arguments.root}")
