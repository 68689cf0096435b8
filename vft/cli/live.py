"""Follow a run from another terminal: vft live RUN [--svg FILE] [--step N]

Reads the files that the run writes and shows what its own terminal shows, until the run ends or Ctrl-C is pressed.
Without a terminal it prints a line for a step now and then (log.every_steps), and how the run ended.
--svg draws one picture instead; --step waits until the run has done that many steps.
"""

from __future__ import annotations

import io
import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any

from rich.console import Console

from vft.cli.arguments import Arguments, ExistingFolder, Positional, command, written_as
from vft.common.errors import UserError
from vft.common.files import replace_text
from vft.config import run as configs
from vft.reporting.progress import LiveView, RunState, step_text
from vft.reporting.run_folder import scores_of
from vft.training.checkpoint import list_checkpoints
from vft.training.checks import ENDED

POLL_S = 0.2
SILENCE_S = 120.0
"""Time without a line after which the view says so, instead of the time that is left; for slow steps ten of them."""
FINISHED = "finished"


class LiveArguments(Arguments):
    """Arguments of `vft live`."""

    run: Annotated[ExistingFolder, Positional("RUN")]
    """output_dir of a run that is at work or done"""
    svg: Annotated[Path, written_as(".svg")] | None = None
    """draw one picture into this file instead"""
    step: int = 0
    """with --svg: draw it when the run has done so many optimizer steps"""


@command(LiveArguments, __doc__)
def main(arguments: LiveArguments) -> None:
    """Command line."""
    folder, svg = arguments.run, arguments.svg
    state, config = state_of(folder), configs.load(folder / "config.toml")
    paper = Console(width=100, record=True, force_terminal=True, file=io.StringIO())
    view = LiveView(state, paper if svg else Console(stderr=True))
    is_plain = svg is None and not view.console.is_terminal
    if svg is None and not is_plain:
        view.start()
    try:
        with (folder / "metrics.jsonl").open(encoding="utf-8") as lines:
            said = ("", -config.log.every_steps)
            while True:
                update(state, folder, lines)
                is_over = state.ended == FINISHED or (folder / ENDED).is_file()
                if is_plain:
                    said = say(state, said, 1 if is_over else config.log.every_steps)
                if is_over or (svg is not None and state.line["step"] >= arguments.step):
                    break
                time.sleep(POLL_S)
    except FileNotFoundError:
        raise UserError(f"{folder}: no metrics.jsonl; the run has not begun") from None
    finally:
        view.stop()
    if is_plain:
        print(state.ended)
    if svg is not None:
        paper.print(state)
        picture = paper.export_svg(title=f"python -m vft.recipes.{config.task}")
        fonts = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # they come from a server; any monospaced font will do
        replace_text(svg, fonts.sub("", picture))
        print(f"wrote {svg}")


def say(state: RunState, said: tuple[str, int], every: int) -> tuple[str, int]:
    """Print the newest scores and the newest step, if they are new since `said` and, for the step, `every` steps have
    passed. Returns what is said now."""
    scores, step = said
    if state.evaluation != scores:
        print(scores := state.evaluation, flush=True)
    if "loss" in state.line and state.line["step"] >= step + every:
        step = state.line["step"]
        print(f"step {step}/{state.max_steps}  {step_text(state.line)}", flush=True)
    return scores, step


def state_of(folder: Path) -> RunState:
    """What is known of a run before its first line of metrics.jsonl. UserError if the folder is no run's."""
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder}: no run.json; name the output_dir of a run")
    config = configs.load(folder / "config.toml")
    state = RunState(f"{config.task}: {config.output_dir}", config.train.max_steps or 0)
    started = json.loads((folder / "run.json").read_text(encoding="utf-8"))["started"]
    state.begin_s = time.monotonic() - (time.time() - datetime.fromisoformat(started).timestamp())
    return state


def update(state: RunState, folder: Path, lines: IO[str]) -> None:
    """Add what the run has written since the last call."""
    while line := lines.readline():
        if not line.endswith("\n"):  # it is being written
            lines.seek(lines.tell() - len(line.encode()))
            break
        entry: dict[str, Any] = json.loads(line)
        if "loss" in entry:
            before_s = state.step_ends[-1][0] if state.step_ends else 0.0
            state.add_step(entry, before_s + entry["step_time_s"])
        else:
            state.add_scores(entry["step"], scores_of(entry))
    for newest in list_checkpoints(folder / "checkpoints")[:1]:
        age_s = time.time() - newest.stat().st_mtime
        state.checkpoint = (int(newest.name.removeprefix("step-")), time.monotonic() - age_s)
    state.ended = ending(state, folder)
    file = folder / "quarantine.jsonl"
    state.num_quarantined = file.read_text(encoding="utf-8").count("\n") if file.is_file() else 0


def ending(state: RunState, folder: Path) -> str:
    """Why nothing more comes: the run is finished, was stopped, has failed, or has been silent for long. Empty while it
    is at work."""
    if (folder / ENDED).is_file():
        return (folder / ENDED).read_text(encoding="utf-8").strip()
    # A run writes its settings when it starts, and its report when it is done: by epochs or patience also before the
    # last step that is known here.
    files = [folder / name for name in ("config.toml", "metrics.jsonl", "report.html")]
    started_s, written_s, report_s = (file.stat().st_mtime if file.is_file() else 0.0 for file in files)
    if state.line["step"] == state.max_steps or report_s >= max(started_s, written_s):
        return FINISHED
    signs = [started_s, written_s, *(one.stat().st_mtime for one in list_checkpoints(folder / "checkpoints")[:1])]
    silence_s = time.time() - max(signs)
    if silence_s < max(SILENCE_S, 10 * state.line.get("step_time_s", 0.0)):
        return ""
    ago = f"{silence_s / 60:.0f} min" if silence_s < 2 * 3600 else f"{silence_s / 3600:.0f} h"
    return f"no sign of life for {ago}; last step {state.line['step']:,}"
