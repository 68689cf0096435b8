"""Follow a run from another terminal: vft live RUN [--svg FILE] [--step N]

Reads the files that the run writes and shows what its own terminal shows, until the run is done or Ctrl-C is pressed.
--svg draws one picture instead; --step waits until the run has done that many steps.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from vft.cli.arguments import parse_arguments
from vft.common.console import user_errors
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.config import run as configs
from vft.reporting.progress import LiveView, RunState
from vft.reporting.run_folder import scores_of
from vft.training.checkpoint import list_checkpoints

POLL_S = 0.2


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line."""
    arguments = parse_arguments(__doc__, add_arguments, argv, prog)
    with user_errors():
        paper = Console(width=100, record=True, force_terminal=True, file=io.StringIO())
        console = paper if arguments.svg else Console(stderr=True)
        watch(arguments.run, arguments.step, console, once=arguments.svg is not None)
        if arguments.svg is not None:
            picture = paper.export_svg(title=f"python -m vft.recipes.{read(arguments.run).task}")
            fonts = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # they come from a server; any monospaced font will do
            replace_text(arguments.svg, fonts.sub("", picture))
            print(f"wrote {arguments.svg}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="output_dir of a run that is at work or done")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw one picture into this file instead")
    parser.add_argument(
        "--step", type=int, default=0, metavar="N", help="with --svg: draw it when the run has done N optimizer steps"
    )


def read(folder: Path) -> configs.Config:
    """Settings of a run. UserError if the folder is no run."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: no run.json; name the output_dir of a run")
    return configs.load(folder / "config.toml")


def watch(folder: Path, step: int, console: Console, once: bool) -> None:
    """Show the run until it is done, or with `once` print it when it has done `step` steps."""
    config = read(folder)
    state = RunState(f"{config.task}: {config.output_dir}", config.train.max_steps or 0)
    view = LiveView(state, console)
    started = json.loads((folder / "run.json").read_text(encoding="utf-8"))["started"]
    if not once:
        view.start()
    state.begin_s = time.monotonic() - (time.time() - datetime.fromisoformat(started).timestamp())
    try:
        with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
            while True:
                update(state, folder, lines)
                if once and state.line["step"] >= step:
                    console.print(state)
                    return
                if state.line["step"] == state.max_steps:
                    return
                time.sleep(POLL_S)
    except FileNotFoundError:
        raise UserError(f"{folder}: no metrics.jsonl; the run has not begun") from None
    finally:
        view.stop()


def update(state: RunState, folder: Path, lines: IO[str]) -> None:
    """Add what the run has written since the last call."""
    while line := lines.readline():
        entry: dict[str, Any] = json.loads(line)
        if "loss" in entry:
            before_s = state.step_ends[-1][0] if state.step_ends else 0.0
            state.add_step(entry, before_s + entry["step_time_s"])
        else:
            state.add_scores(entry["step"], scores_of(entry))
    for newest in list_checkpoints(folder / "checkpoints")[:1]:
        age_s = time.time() - newest.stat().st_mtime
        state.checkpoint = (int(newest.name.removeprefix("step-")), time.monotonic() - age_s)
    file = folder / "quarantine.jsonl"
    state.num_quarantined = file.read_text(encoding="utf-8").count("\n") if file.is_file() else 0


if __name__ == "__main__":
    main()
