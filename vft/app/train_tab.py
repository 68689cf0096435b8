"""The tab Train: a form of all settings with the TOML beside it, and the run that was started from them."""

from __future__ import annotations

import re
from functools import partial
from html import escape
from typing import Any

import gradio as gr
import torch

from vft.app import draft as drafts
from vft.app import form, run_view, runs
from vft.app.parts import Shared, told
from vft.app.workspace import is_run
from vft.common.errors import UserError
from vft.config.listing import Setting, shown
from vft.recipes import TASKS


def build(shared: Shared) -> None:
    """The tab's components."""
    space, draft = shared.space, shared.draft
    settings = form.form_settings()
    filled, started = gr.State({}), gr.State("")
    with gr.Row():
        source = gr.Dropdown([], label="start from a recipe or the settings of a run", scale=4)
        load = gr.Button("Load", scale=1)
    with gr.Row():
        with gr.Column(scale=1):
            draft.render()
            verdict = gr.HTML()
            with gr.Row():
                processes = gr.Number(max(1, torch.cuda.device_count()), label="processes (one a GPU)", precision=0)
                devices = gr.Textbox(label="GPUs, such as 0,1 (empty: all)")
            start = gr.Button("Start training", variant="primary", elem_id="start")
        with gr.Column(scale=1):
            widgets = _widgets()
    with gr.Column(elem_id="started"):
        run_view.build(space, started)

    @told
    def read(name: str | None) -> str:
        file = drafts.recipes(space).get(name or "")
        if file is None:
            raise UserError("start from: choose a recipe or the settings of a run")
        return file.read_text(encoding="utf-8", errors="replace")

    @told
    def begin(text: str, count: float | None, gpus: str | None, *fields: str | None) -> str:
        values = form.values_in(text)
        for setting, field in zip(settings, fields, strict=True):
            if (field or "") != values.get(setting.key, ""):
                raise UserError(f"{setting.key}: the form and the text still differ; look at it, and press again")
        return str(runs.start(space, text, int(count or 1), (gpus or "").strip()))

    def follow(text: str, before: dict[str, str]) -> list[Any]:
        """The form after the text has changed: only the fields whose values did, so that nothing that is being typed
        in another one is lost."""
        try:
            values = form.values_in(text)
        except UserError:
            return [gr.skip()] * (len(settings) + 1)
        changed = [values.get(one.key, "") != before.get(one.key, "") for one in settings]
        fields = [values.get(one.key, "") if new else gr.skip() for one, new in zip(settings, changed, strict=True)]
        return [*fields, values]

    def check(text: str) -> str:
        if not text.strip():
            return "<p>Load a recipe, or take data in the tab Data.</p>"
        try:
            config = drafts.checked(space, text)
        except UserError as error:
            return f'<p class="bad">{escape(str(error))}</p>'
        name = escape(str(config.output_dir))
        if is_run(space.path(config.output_dir, "output_dir")):
            return f"<p class=note>Valid, but {name} is a run already: choose another output_dir.</p>"
        return f"<p class=good>These settings are valid. The run will be {name}.</p>"

    gr.on(shared.shown, lambda: gr.Dropdown(choices=[*drafts.recipes(space)]), None, source, show_progress="hidden")
    load.click(read, source, draft)
    fields = [*widgets.values()]
    draft.change(follow, [draft, filled], [*fields, filled], show_progress="hidden", trigger_mode="always_last")
    draft.change(check, draft, verdict, show_progress="hidden", trigger_mode="always_last")
    for setting in settings:
        widget = widgets[setting.key]
        events = [widget.input] if isinstance(widget, gr.Dropdown) else [widget.blur, widget.submit]
        gr.on(events, told(partial(_changed, setting.key)), [draft, widget], draft, show_progress="hidden")
    # The run is shown below the form, which is longer than a screen.
    show = "() => setTimeout(() => document.querySelector('#started').scrollIntoView({behavior: 'smooth'}), 500)"
    start.click(begin, [draft, processes, devices, *fields], started).success(None, js=show)


def _widgets() -> dict[str, gr.Dropdown | gr.Textbox]:
    """A field for each setting, by key, in an accordion for each table."""
    widgets: dict[str, gr.Dropdown | gr.Textbox] = {}
    for table in form.form_tables():
        title, *more = re.split(r"(?<=\w[).]) | \(|: |, or ", table.about.replace("`", ""))
        name = f"[{table.name}] {title.rstrip('.')}" if table.name else "task, folder, seed"
        with gr.Accordion(name, open=not table.name):
            if table.name and more:
                gr.Markdown(table.about)
            for setting in table.settings:
                widgets[setting.key] = _widget(setting)
    return widgets


def _widget(setting: Setting) -> gr.Dropdown | gr.Textbox:
    unset = "needed" if setting.is_needed else f"default: {shown(setting.default) or 'not set'}"
    if listed := [*TASKS] if setting.key == "task" else setting.choices:
        choices = [(unset, ""), *((one, one) for one in listed)]
        return gr.Dropdown(choices, value="", label=setting.key, info=setting.meaning, filterable=False)
    return gr.Textbox(label=setting.key, info=f"{setting.meaning} ({setting.values})", placeholder=unset, max_lines=1)


def _changed(key: str, text: str, value: str | None) -> Any:
    new = form.with_value(text, key, value or "")
    return gr.skip() if new == text else new
