"""The view of one run: what it is doing, curves, answers, log, and its buttons. It follows the run's files."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vft.app import runs
from vft.app.jobs import Job
from vft.app.parts import as_text, told
from vft.app.workspace import Workspace
from vft.common.errors import UserError
from vft.reporting.page import render
from vft.reporting.report import charts
from vft.reporting.run_folder import RecordedRun, read_run

PERIOD_S = 2.0
"""Between two looks at the run's files."""
MAX_ANSWERS = 12


def build(space: Workspace, chosen: gr.State) -> None:
    """Components that show the run whose folder, as text, is in `chosen`; nothing while that is empty."""
    seen = gr.State("")
    with gr.Column(visible=False) as panel:
        head = gr.HTML(elem_classes="run-head")
        with gr.Row():
            stop = gr.Button("Save and stop", elem_id="stop")
            kill = gr.Button("Stop at once", variant="stop")
            go_on = gr.Button("Go on", variant="primary", elem_id="go-on")
        with gr.Accordion("Go on with other settings", open=False):
            overrides = gr.Textbox(
                label="settings that change", placeholder="train.max_steps=2000 checkpoint.every_steps=100"
            )
            with gr.Row():
                number = gr.Number(0, label="processes (0: as before)", precision=0, minimum=0)
                devices = gr.Textbox(label="GPUs, such as 0,1 (empty: all)")
        curves = gr.HTML(elem_classes="vft-charts")
        with gr.Accordion("Answers about held-out samples, first and newest evaluation", open=False):
            answers = gr.HTML()
        with gr.Accordion("Log", open=False):
            log = gr.HTML()
        with gr.Accordion("Report", open=False):
            report = gr.HTML()
    outputs = [panel, head, stop, kill, go_on, curves, answers, log, report, seen]

    def refresh(folder: str, before: str) -> list[Any]:
        try:
            with runs.reading(Path(folder)):
                return shown(space, folder, before)
        except UserError as error:  # said in their place, not every two seconds as a message
            text = f'<p class="bad">{escape(as_text(str(error)))}</p>'
            return [gr.Column(visible=True), text, *[gr.skip()] * 3, *[""] * 5]

    timer = gr.Timer(PERIOD_S)
    for event in (chosen.change, timer.tick):
        event(refresh, [chosen, seen], outputs, show_progress="hidden", trigger_mode="once")

    @told
    def ask_to_stop(folder: str) -> None:
        Job(space.run(folder)).stop()

    @told
    def stop_now(folder: str) -> None:
        Job(space.run(folder)).stop(at_once=True)

    @told
    def resume(folder: str, text: str, count: float | None, gpus: str | None) -> None:
        path = space.run(folder)
        runs.go_on(
            space, path, shlex.split(text or ""), int(count or 0) or runs.processes_of(path), (gpus or "").strip()
        )

    for button, handler, inputs in (
        (stop, ask_to_stop, [chosen]),
        (kill, stop_now, [chosen]),
        (go_on, resume, [chosen, overrides, number, devices]),
    ):
        button.click(handler, inputs).then(refresh, [chosen, seen], outputs, show_progress="hidden")


def shown(space: Workspace, folder: str, before: str) -> list[Any]:
    """Values of the view's components; `before` is the mark of what they show now, so that only changes are sent."""
    if not folder:
        return [gr.Column(visible=False), *[gr.skip()] * 8, ""]
    path = space.run(folder)
    now, files = runs.status(path), [path / name for name in ("metrics.jsonl", "job.log", "report.html")]
    metrics, log, report = (f"{file.stat().st_mtime_ns}" if file.is_file() else "" for file in files)
    old_folder, old_metrics, old_log, old_report = (before.split("|") + [""] * 4)[:4]
    is_other = old_folder != folder
    buttons = [
        gr.Button(visible=bool(now.is_alive and now.word not in ("elsewhere", "stopping"))),
        gr.Button(visible=bool(now.is_alive and now.word != "elsewhere")),
        gr.Button(visible=not now.is_alive),
    ]
    curves = answers = gr.skip()
    if is_other or metrics != old_metrics:
        run = read_run(path)
        curves, answers = charts_html(run), answers_html(run)
    return [
        gr.Column(visible=True),
        head_html(space.shown(path), now),
        *buttons,
        curves,
        answers,
        log_html(path) if is_other or log != old_log else gr.skip(),
        report_html(path) if is_other or report != old_report else gr.skip(),
        "|".join([folder, metrics, log, report]),
    ]


def head_html(name: str, now: runs.Status) -> str:
    """What the run is doing: in a sentence, as a bar, and as the live view of a terminal."""
    state = now.state
    share = min(1.0, state.line["step"] / state.max_steps) if state.max_steps else 0.0
    rows = "\n".join(row.plain for row in state.rows(88)[1:])
    return (
        f'<h3>{escape(name)} <span class="badge {now.word}">{now.word}</span></h3><p>{escape(now.text)}</p>'
        f'<div class="bar" role="progressbar" aria-valuenow="{share:.0%}"><div style="width:{share:.1%}"></div></div>'
        f"<pre>{escape(rows)}</pre>"
    )


def charts_html(run: RecordedRun) -> str:
    """The curves of the report."""
    figures = charts(run)
    return render("charts.html", charts=figures) if figures else "<p>No step is done yet.</p>"


def answers_html(run: RecordedRun) -> str:
    """Some answers about held-out samples, of the first and the newest evaluation side by side."""
    if not run.predictions:
        return "<p>None yet: `eval.every_steps` with `eval.sources` or `eval.split` makes a run score itself.</p>"
    *first, (newest, rows) = run.predictions.items()
    before = {str(row.get("id")): row for row in first[0][1]} if first else {}
    heads = ["sample", "right answer", *([first[0][0]] if first else []), newest]
    lines = []
    for row in rows[:MAX_ANSWERS]:
        cells = [row.get("id"), row.get("reference")]
        cells += [before.get(str(row.get("id")), {}).get("prediction", "")] if first else []
        lines.append("".join(f"<td>{escape(str(cell))}</td>" for cell in [*cells, row["prediction"]]))
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def log_html(folder: Path) -> str:
    """The end of what the run has printed."""
    text = Job(folder).tail() or "This run was not started by the page: its log is in its own terminal."
    return f'<pre class="log">{escape(text)}</pre>'


def report_html(folder: Path) -> str:
    """The report in a frame of its own, which runs no script."""
    file = folder / "report.html"
    if not file.is_file():
        return "<p>It is written when the run is done.</p>"
    page = escape(file.read_text(encoding="utf-8", errors="replace"), quote=True)
    return f'<iframe class="report" title="report" sandbox srcdoc="{page}"></iframe>'
