"""Training runs from the page: start one, stop it, go on, and what it is doing."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vft.app import draft
from vft.app.jobs import Job
from vft.app.workspace import Workspace
from vft.cli.live import FINISHED, state_of, update
from vft.common.errors import UserError, first_line
from vft.config.run import Config
from vft.reporting.progress import RunState
from vft.reporting.run_folder import read_json
from vft.training.checks import check_shares

SETTINGS = "settings.toml"
"""In the folder of a run that the page started: its settings as they were written, comments included."""
ERROR = re.compile(r"error: |\w*(Error|Exception): |Killed")
"""Begins the line of a log that says why a run failed."""


def start(space: Workspace, text: str, processes: int, devices: str) -> Path:
    """Start the run with the settings `text`. Returns its folder. `devices` is CUDA_VISIBLE_DEVICES, empty for all.

    Raises UserError if a setting is wrong, or the folder has a run already.
    """
    config = draft.checked(space, text)
    config.require_training()
    check_shares(config, processes)
    folder = space.path(config.output_dir, "output_dir")
    if (folder / "config.toml").is_file():
        raise UserError(
            f"output_dir = {str(config.output_dir)!r}: there is a run already; choose another folder, or go on "
            "with that one in the tab Runs"
        )
    if folder.exists() and not (folder / "job.lock").is_file() and any(folder.iterdir()):
        raise UserError(f"output_dir = {str(config.output_dir)!r}: holds something else; name a folder of its own")
    argv = command(config, space.shown(folder / SETTINGS), processes)
    Job(folder).start(argv, space.home, environment(devices), {SETTINGS: text})
    return folder


def go_on(space: Workspace, folder: Path, overrides: Sequence[str], processes: int, devices: str) -> None:
    """Resume a run that was stopped, or prolong it. UserError if it is at work, or a setting is wrong."""
    written = next((folder / name for name in (SETTINGS, "config.toml") if (folder / name).is_file()), None)
    if written is None:
        raise UserError(f"{space.shown(folder)}: no settings there; name the output_dir of a run")
    config = draft.checked(space, written.read_text(encoding="utf-8"), overrides)
    if space.path(config.output_dir, "output_dir") != folder:
        raise UserError(f"output_dir = {str(config.output_dir)!r}: is not {space.shown(folder)}, where the run is")
    check_shares(config, processes)
    argv = command(config, space.shown(written), processes, overrides)
    Job(folder).start(argv, space.home, environment(devices))


def command(config: Config, file: str, processes: int, overrides: Sequence[str] = ()) -> list[str]:
    """The command that trains, as one would type it."""
    task = config.task or "caption"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    module = ["-m", f"vft.recipes.{task}"]
    return [sys.executable, *(torchrun if processes > 1 else []), *module, file, *overrides]


def environment(devices: str) -> dict[str, str]:
    """What the process gets beside the page's own environment."""
    package = str(Path(__file__).parents[2])  # a checkout that isn't installed
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Not from the current folder, where data may lie: `vft app` runs no code of it.
    own = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return own | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})


@dataclass(frozen=True)
class Status:
    """What a run is doing."""

    word: str
    """starting, training, stopping, finished, stopped, failed, silent, or elsewhere: at work, not from this page."""
    text: str
    """The same in a sentence."""
    state: RunState
    """What the live view of a terminal shows."""

    @property
    def is_alive(self) -> bool:
        """Whether it may still write."""
        return self.word in ("starting", "training", "stopping", "elsewhere")


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever is wrong in the files of a run is a UserError: they come from anywhere, and others are still shown."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{folder}: the files of this run are damaged ({what}); look at them, or move it away"
        ) from error


def status(folder: Path) -> Status:
    """What a run is doing, by its files and, if the page started it, its process. UserError if they are damaged."""
    with reading(folder):
        return _status(folder)


def _status(folder: Path) -> Status:
    job, state = Job(folder), RunState(folder.name, 0)
    if (folder / "run.json").is_file() and (folder / "config.toml").is_file():
        state = state_of(folder)
        if (folder / "metrics.jsonl").is_file():
            with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
                update(state, folder, lines)
    step = f"step {state.line['step']:,}" + (f" of {state.max_steps:,}" if state.max_steps else "")
    if job.is_alive:
        if "stopping" in job.record:
            return Status("stopping", f"saves after this step, then stops; {step}", state)
        is_begun = state.line["step"] > 0 and not state.ended
        return Status("training", step, state) if is_begun else Status("starting", "reads data and weights", state)
    error = next((line for line in reversed(job.tail().splitlines()) if ERROR.match(line)), "") if job.record else ""
    if state.ended == FINISHED:
        return Status("finished", f"{step}; it did not go on: {error[:500]}" if error else step, state)
    if job.record:
        if "stopping" in job.record or not error:
            return Status("stopped", f"at {step}; it can go on", state)
        return Status("failed", error[:500], state)
    if (word := state.ended.partition(" ")[0].rstrip(":")) in ("stopped", "failed"):
        return Status(word, f"{state.ended}; {step}", state)
    if state.ended:
        return Status("silent", f"{state.ended}; it can go on if nothing is at work there", state)
    return Status("elsewhere", f"{step}, started outside this page", state)


def processes_of(folder: Path) -> int:
    """With how many processes a run was started last; 1 if unknown."""
    found: Any = read_json(folder / "run.json").get("processes")
    return found if isinstance(found, int) else 1
