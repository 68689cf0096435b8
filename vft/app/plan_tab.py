"""The tab Plan: whether a run fits on GPUs that need not be there, how long it takes, and what to change.

`vft plan --json` runs in a process of its own: the planner makes a process group for GPUs that aren't there, and takes
seconds to minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from vft.app import draft
from vft.app.parts import Shared, told
from vft.app.workspace import Workspace
from vft.common.device_specs import CARDS, card_name
from vft.common.errors import UserError
from vft.preparation.planning import overrides

DRAFT = "those being made (tab Train)"
MAX_PROPOSALS = 4
WHY = {
    "needed": "Take what fits",
    "instead": "Or take",
    "faster": "Take what is faster",
    "more GPUs": "Take {gpus} GPUs",
}
"""On a button, by why a change is proposed."""
Plan = dict[str, Any]
"""As `vft plan --json` prints it; empty without one."""


def build(shared: Shared) -> None:
    """The tab's components."""
    space = shared.space
    first = (card_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else None) or "H100"
    gr.Markdown(
        "Whether the run fits and how long it takes, counted on tensors without values: on any machine, before a GPU "
        "is rented. Times are estimates from the card's data sheet."
    )
    with gr.Row():
        source = gr.Dropdown([DRAFT, *draft.recipes(space)], value=DRAFT, label="settings", scale=3)
        gpus = gr.Number(1, label="GPUs", precision=0, minimum=1, min_width=90)
        card = gr.Dropdown(list(CARDS), value=first, label="card", min_width=120)
        memory = gr.Number(CARDS[first].memory_gib, label="GiB of each", min_width=90)
        samples = gr.Number(0, label="samples (0: counted)", precision=0, min_width=90)
    with gr.Row():
        start = gr.Button("Plan", variant="primary", elem_id="plan")
        stop = gr.Button("Stop")
    shown, made = gr.HTML(elem_id="planned"), gr.State({})
    with gr.Row():
        takes = [gr.Button(visible=False) for _ in range(MAX_PROPOSALS)]

    def chosen(name: str, text: str | None) -> str:
        if name == DRAFT:
            return text or ""
        file = draft.recipes(space).get(name) or space.existing(name, "settings")
        return file.read_text(encoding="utf-8")

    @told
    def plan(name: str, text: str | None, *asked: Any) -> Iterator[list[Any]]:
        for seconds, found in planned(space, chosen(name, text), *asked):
            yield _shown(seconds, found)

    def take(number: int, found: Plan, name: str, text: str | None) -> list[Any]:
        proposal = found["proposals"][number]
        if name == DRAFT or not (text or "").strip():
            gr.Info("taken into the settings; plan again to see all of it")
        else:
            gr.Warning(f"the settings are now {name} with this change, in place of those in the tab Train")
        return [draft.changed(chosen(name, text), proposal["set"]), DRAFT, proposal["gpus"]]

    def names() -> Any:
        return gr.Dropdown(choices=[DRAFT, *draft.recipes(space)])

    gr.on(shared.shown, names, None, source, show_progress="hidden")
    card.input(lambda name: CARDS[name].memory_gib, card, memory, show_progress="hidden")
    running = start.click(plan, [source, shared.draft, gpus, card, memory, samples], [shown, made, *takes])
    stop.click(lambda: _shown(0, {}), None, [shown, made, *takes], cancels=running, show_progress="hidden")
    for number, button in enumerate(takes):
        button.click(told(partial(take, number)), [made, source, shared.draft], [shared.draft, source, gpus])


def planned(
    space: Workspace, text: str, gpus: float | None, card: str, memory_gib: float | None, samples: float | None
) -> Iterator[tuple[int, Plan]]:
    """The seconds that planning has taken so far, twice a second, and at last the plan. The process ends with the
    iterator, also where it isn't read to its end.

    Raises UserError if the settings are wrong, or the planner says so.
    """
    draft.checked(space, text, needs_model=False)  # of a released model the planner knows the shapes
    space.own.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="plan-", dir=space.own) as name:
        file, output, log = (Path(name) / part for part in ("settings.toml", "plan.json", "log"))
        file.write_text(text, encoding="utf-8")
        asked = {"--gpus": int(gpus or 1), "--gpu": card, "--gpu-memory-gib": memory_gib, "--samples": samples}
        given = [word for option, value in asked.items() if value for word in (option, str(value))]
        # -P: no code of the folder with the data is imported.
        argv = [sys.executable, "-P", "-m", "vft.cli.main", "plan", str(file), "--json", *given]
        began = time.monotonic()
        with output.open("wb") as out, log.open("wb") as errors:
            process = subprocess.Popen(
                argv, cwd=space.home, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
            )
        try:
            while process.poll() is None:
                yield int(time.monotonic() - began), {}
                time.sleep(0.5)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = output.read_text(encoding="utf-8")
        if not said:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
            raise UserError(lines[-1].removeprefix("error: ").replace(f"{file}: ", ""))
        yield int(time.monotonic() - began), json.loads(said)


def _shown(seconds: int, found: Plan) -> list[Any]:
    """The plan, or that it is at work, and the buttons of its proposals."""
    labels = [
        WHY[one["why"]].format(**one) + (f": {overrides(one['set'])}" if one["set"] else "")
        for one in found.get("proposals", ())
    ][:MAX_PROPOSALS]
    buttons = [gr.Button(label, visible=True) for label in labels]
    buttons += [gr.Button(visible=False)] * (MAX_PROPOSALS - len(labels))
    working = f"<p>counting, {seconds} s: mostly 20 s to a few minutes</p>" if seconds or found else ""
    return [as_html(found) if found else working, found, *buttons]


def as_html(found: Plan) -> str:
    """The verdict, a bar of memory, speed and hours; below it all that was tried."""
    best, run = found["tried"][found["best"]], found["run"]
    gpus = f"{found['gpus']} x {found['gpu'] or 'GPU'} ({found['gpu_memory_gib']:g} GiB)"
    facts = {"a row": "{tokens:,} tokens, {vision_tokens:,} of them video; {samples} sample(s)".format(**found["row"])}
    if run:
        facts["a step"] = f"{run['step_s']:.3g} s; {run['share_of_peak']:.0%} of the peak; waits for {run['bound_by']}"
        facts["speed"] = f"{run['tokens_per_s']:,.0f} tokens, {run['samples_per_s']:,.1f} samples a second"
        facts["the run"] = f"{_duration(run['hours'])}: {run['steps_are']}; evaluation and saving not counted"
    lines = [line for line in found["verdict"] if line != "fits"]
    head = ["recomputed in the backward pass", "GiB", "of it", *(["s a step"] if found["gpu"] else []), ""]
    rows = [
        [
            one["settings"],
            f"{one['total_gib']:,.2f}",
            f"{one['total_gib'] / found['gpu_memory_gib']:.0%}",
            *([f"{one['step_s']:.3g}" if one["step_s"] else ""] if found["gpu"] else []),
            "fits" if one["fits"] else "does not fit",
        ]
        for one in found["tried"]
    ]
    word, colour = ("fits", "good") if found["fits"] else ("does not fit", "bad")
    return "".join(
        [
            f'<h3><span class="{colour}">{word}</span>: {escape(found["model"])} on {escape(gpus)}</h3>',
            memory_bar(best, found["gpu_memory_gib"], found["usable_gib"]),
            '<dl class="facts">',
            *(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()),
            "</dl>",
            *(f"<p>{escape(line)}</p>" for line in lines),
            f'<div class="wide"><table><thead><tr>{"".join(f"<th>{one}</th>" for one in head)}</tr></thead><tbody>',
            *(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows),
            "</tbody></table></div>",
        ]
    )


def _duration(hours: float | None) -> str:
    if hours is None:
        return "?"
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.2g} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"


def memory_bar(one: Mapping[str, Any], memory_gib: float, usable_gib: float) -> str:
    """What a GPU holds at the worst moment of a step, by kind, against what it has."""
    end = max(memory_gib, one["total_gib"])
    kinds = [(i, kind, gib) for i, (kind, gib) in enumerate(one["gib"].items()) if gib >= 0.005]
    parts = [f'<i class="s{i}" style="width: {gib / end:.2%}"></i>' for i, _, gib in kinds]
    named = [f'<span class="s{i}">{escape(kind)} {gib:,.2f}</span>' for i, kind, gib in kinds]
    label = f"{one['total_gib']:,.2f} GiB of {memory_gib:g} ({usable_gib:,.2f} usable beside driver and libraries)"
    host = f", and {one['host_gib']:,.1f} GiB in the host's memory" if one["host_gib"] else ""
    limit = f'<b style="left: {usable_gib / end:.2%}"></b>'
    return (
        f'<div class="memory" role="img" aria-label="{label}">{"".join(parts)}{limit}</div>'
        f'<p class="kinds">{" ".join(named)}</p><p class="soft">{escape(one["settings"])}: {label}{host}</p>'
    )
