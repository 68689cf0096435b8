"""The tab Runs: all runs in the folders, one of them in full, several side by side."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vft.app import run_view, runs
from vft.app.jobs import Job
from vft.app.parts import Shared, told
from vft.app.workspace import Workspace
from vft.cli.compare import comparison_page, read
from vft.common.errors import UserError
from vft.reporting.run_folder import read_json

HEADS = ["run", "what it does", "where it is", "loss", "newest scores", "started (UTC)"]
NUM_SCORES = 2
"""In the table; the run's own view has all."""
PERIOD_S = 10.0
"""Between two looks at all runs."""


def build(shared: Shared) -> None:
    """The tab's components."""
    space = shared.space
    chosen = gr.State("")
    with gr.Row():
        name = gr.Dropdown([], label="run", scale=4, elem_id="run")
        again = gr.Button("Look again", scale=1)
    table = gr.HTML()
    alive = gr.State(False)
    run_view.build(space, chosen)
    with gr.Accordion("Compare runs", open=False):
        several = gr.Dropdown([], multiselect=True, label="two to six runs", elem_id="compare")
        compare = gr.Button("Compare")
        page = gr.HTML()

    def look() -> list[Any]:
        found = space.runs()
        names, is_alive = [space.shown(folder) for folder in found], any(Job(folder).is_alive for folder in found)
        return [gr.Dropdown(choices=names), gr.Dropdown(choices=names), table_html(space, found), is_alive]

    def look_again(was_alive: bool) -> list[Any]:
        """As long as a run of the page is at work, and once after that."""
        return look() if was_alive or any(Job(folder).is_alive for folder in space.runs()) else [gr.skip()] * 4

    @told
    def lay_side_by_side(names: list[str]) -> str:
        if len(names) < 2:
            raise UserError("compare: choose at least two runs")
        with runs.reading(space.home):
            text = comparison_page(read([space.run(name) for name in names]))
        return f'<iframe class="report" title="comparison" sandbox srcdoc="{escape(text, quote=True)}"></iframe>'

    @told
    def choose(chosen_name: str | None) -> str:
        return str(space.run(chosen_name)) if chosen_name else ""

    shown = [name, several, table, alive]
    gr.on([again.click, *shared.shown], look, None, shown, show_progress="hidden")
    gr.Timer(PERIOD_S).tick(look_again, alive, shown, show_progress="hidden", trigger_mode="once")
    name.change(choose, name, chosen)
    compare.click(lay_side_by_side, several, page)


def table_html(space: Workspace, folders: list[Path]) -> str:
    """A line for each run."""
    if not folders:
        return "<p>No run yet. The tab Train starts one.</p>"
    lines = []
    for folder in folders:
        try:
            now = runs.status(space.run(folder))
        except UserError as error:  # of an earlier version, or damaged: the others are shown all the same
            lines.append(f"<td>{escape(space.shown(folder))}</td><td colspan=5>{escape(str(error))}</td>")
            continue
        loss = now.state.line.get("loss")
        begun = str(read_json(folder / "run.json").get("started", ""))[:16].replace("T", " ")
        cells = [space.shown(folder), now.word, now.text, "" if loss is None else f"{loss:.4f}"]
        scores = now.state.evaluation.partition(": ")[2].split("  ")
        cells += ["  ".join(scores[:NUM_SCORES]), begun]
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{one}</th>" for one in HEADS)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
