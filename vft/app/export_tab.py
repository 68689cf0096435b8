"""The tab Export: write the adapter or model of a checkpoint, see its card, and how it is used and served."""

from __future__ import annotations

import html
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import gradio as gr
from markdown_it import MarkdownIt

from vft.app.jobs import Job
from vft.app.parts import Shared, told
from vft.app.runs import environment
from vft.app.workspace import Workspace
from vft.common.errors import UserError
from vft.common.files import digest
from vft.models.pretrained import Pretrained
from vft.reporting import serve_command
from vft.reporting.run_folder import read_json, read_settings
from vft.training.checkpoint import list_checkpoints, step_of

NEWEST = "newest"
KINDS = ["adapter or model, as trained", "merged model"]
MARKDOWN = MarkdownIt("js-default", {"html": False}).disable("image")
"""A card may be anyone's: what is HTML in it stays text, links lead to http alone, and no picture is fetched."""


def build(shared: Shared) -> None:
    """The tab's components and events."""
    tab = Export(shared.space)
    with gr.Row():
        run = gr.Dropdown(label="run", min_width=220)
        step = gr.Dropdown([NEWEST], label="checkpoint", min_width=120)
        kind = gr.Radio(KINDS, value=KINDS[0], label="what", min_width=220)
    with gr.Row():
        base = gr.Textbox(label="base model", info="if it was moved, where it is now", min_width=220)
        output = gr.Textbox(label="new folder", min_width=220)
    write = gr.Button("Write", variant="primary")
    with gr.Row():
        name = gr.Dropdown(label="written by this page", min_width=220)
        stop = gr.Button("Stop", min_width=80, scale=0)
    log = gr.Textbox(label="what it prints", lines=4, max_lines=12, interactive=False)
    lines = gr.Code(label="use it", language="shell", interactive=False, wrap_lines=True, visible=False)
    card = gr.HTML(elem_classes="prose")
    timer = gr.Timer(1.0, active=False)
    shown = [log, lines, card, timer]
    opened = gr.on(shared.shown, tab.opened, name, [run, name], show_progress="hidden")
    opened.then(told(tab.look), name, shown)
    run.change(told(tab.steps), run, [step, base], show_progress="hidden")
    gr.on([run.change, step.change, kind.change], tab.folder, [run, step, kind], output, show_progress="hidden")
    write.click(told(tab.start), [run, step, kind, base, output], name, show_progress="hidden")
    gr.on([name.change, timer.tick], told(tab.look), name, shown, show_progress="hidden")
    stop.click(told(tab.stop), name, None)


class Export:
    """What the tab's events do. All that it knows of a job is in the job's folder."""

    def __init__(self, space: Workspace) -> None:
        self.space, self.jobs = space, space.own / "jobs"

    def opened(self, name: str | None) -> list[Any]:
        """Runs to choose from, and what this page has written, the last one first."""
        names = self.names()
        runs = [self.space.shown(run) for run in self.space.runs()]
        return [gr.Dropdown(choices=runs), gr.Dropdown(choices=names, value=name or next(iter(names), None))]

    def names(self) -> list[str]:
        """Folders that were written, or begun."""
        found = [(Job(file.parent).record, file.stat().st_mtime) for file in self.jobs.glob("export-*/job.json")]
        return [target_of(record) for record, _ in sorted(found, key=lambda one: -one[1])]

    def steps(self, run: str) -> list[Any]:
        """Checkpoints of a run, and the base that it was trained on."""
        folder = self.run(run)
        steps = [str(step_of(one)) for one in list_checkpoints(folder / "checkpoints")]
        base = read_settings(folder).get("model", {}).get("path", "")
        return [gr.Dropdown(choices=[NEWEST, *steps], value=NEWEST), base]

    def folder(self, run: str, step: str, kind: str) -> str:
        """A name for the new folder."""
        words = [Path(run or "").name, "merged" if kind == KINDS[1] else "", f"step-{step}" if step != NEWEST else ""]
        return f"exports/{'-'.join(filter(None, words))}" if run else ""

    def start(self, run: str, step: str, kind: str, base: str, output: str) -> Any:
        """Start the job. UserError if the folder is there, or being written."""
        folder, target = self.run(run), self.space.path(output, "new folder")
        if target.exists():
            raise UserError(f"new folder = {output!r}: is there already; name another")
        settings = read_settings(folder)
        recorded = settings.get("model", {}).get("path", "")
        base = self.space.model(base or recorded)
        name = self.space.shown(target)
        words = ["export", self.space.shown(folder), f"--output={name}"]
        words += [f"--step={step}"] if step != NEWEST else []
        words += [f"model.path={json.dumps(base)}"] if base != recorded else []
        if kind == KINDS[1]:
            if "lora" not in settings:
                raise UserError(f"{run}: trained the whole model, which needs no merging; export it as trained")
            adapter = self.adapter(folder, step)
            words = ["merge", f"--base={base}", f"--adapter={self.space.shown(adapter)}", f"--output={name}"]
        self.job(name).start([sys.executable, "-m", "vft.cli.main", *words], self.space.home, environment(""))
        return gr.Dropdown(choices=self.names(), value=name)

    def adapter(self, folder: Path, step: str) -> Path:
        """What of a run is merged: what it exported at its end, or a checkpoint."""
        if step == NEWEST and (folder / "adapter").is_dir():
            return folder / "adapter"
        for checkpoint in list_checkpoints(folder / "checkpoints"):
            if step in (NEWEST, str(step_of(checkpoint))):
                return checkpoint
        raise UserError(f"checkpoint = {step}: {self.space.shown(folder)} has no such checkpoint")

    def run(self, run: str | None) -> Path:
        """The folder of a run. UserError if it is none."""
        return self.space.run(run or "")

    def job(self, name: str) -> Job:
        """The job that writes a folder: one for each, from whichever window."""
        return Job(self.jobs / f"export-{digest(str(self.space.path(name, 'new folder')))}")

    def look(self, name: str | None) -> list[Any]:
        """What a job prints; when it has ended, how what it wrote is used, and its card."""
        if not name:
            return ["", gr.Code(visible=False), "", gr.Timer(active=False)]
        job, target = self.job(name), self.space.path(name)
        if job.is_alive:
            return [job.tail(), gr.Code(visible=False), "", gr.Timer(active=True)]
        if not (target / "README.md").is_file():
            text = f"{job.tail()}\nIt has ended, and wrote nothing."
            return [text, gr.Code(visible=False), "", gr.Timer(active=False)]
        text = (target / "README.md").read_text(encoding="utf-8", errors="replace")
        return [job.tail(), gr.Code(self.lines(target), visible=True), rendered(text), gr.Timer(active=False)]

    def stop(self, name: str | None) -> None:
        """End a job; what it has begun to write is gone."""
        self.job(name or "").stop(at_once=True)

    def lines(self, target: Path) -> str:
        """Commands that ask and serve what was written."""
        shown = self.space.shown(target)
        base = read_json(target / "adapter_config.json").get("base_model_name_or_path")
        use = f"--model {shlex.quote(base)} --adapter" if isinstance(base, str) else "--model"
        asks = [f"vft {command} {use} {shlex.quote(shown)} clip.mp4" for command in ("predict", "chat")]
        adapter: tuple[Any, ...] = ()
        if isinstance(base, str):
            adapter = Pretrained.open(base), read_settings(self.run(run_of(self.job(shown).record))).get("lora")
        serve = serve_command(Path(shown), *adapter)
        return "\n\n".join([*asks, serve or "# vLLM serves no such adapter: write the merged model"])


def rendered(card: str) -> str:
    """A model card as HTML that can't do anything, without its head for the hub."""
    head, _, body = card.removeprefix("---\n").partition("\n---\n") if card.startswith("---\n") else ("", "", card)
    top = f"<details><summary>head</summary><pre>{html.escape(head)}</pre></details>" if head else ""
    return top + str(MARKDOWN.render(body))


def target_of(record: dict[str, object]) -> str:
    """What a job writes, by its `job.json`."""
    argv = record.get("argv")
    words = [str(word) for word in argv] if isinstance(argv, list) else []
    return next((word.removeprefix("--output=") for word in words if word.startswith("--output=")), "")


def run_of(record: dict[str, object]) -> str:
    """The run that a job of `vft export` exports."""
    argv = record.get("argv")
    return str(argv[argv.index("export") + 1]) if isinstance(argv, list) and "export" in argv else ""
