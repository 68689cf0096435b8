"""The page: its tabs in the order of the work, and its look."""

from __future__ import annotations

from importlib import resources
from typing import Any

import gradio as gr

from vft.app import data_tab, export_tab, plan_tab, runs_tab, train_tab, try_tab
from vft.app.parts import Shared
from vft.app.workspace import Workspace

TABS = {
    "Data": data_tab,
    "Plan": plan_tab,
    "Train": train_tab,
    "Runs": runs_tab,
    "Try": try_tab,
    "Export": export_tab,
}
"""Module with `build(shared)`, by the tab's name."""


def build(space: Workspace) -> gr.Blocks:
    """The page over the folders of `space`."""
    with gr.Blocks(title="vft", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        draft = gr.Code(label="settings (TOML)", language="yaml", interactive=True, render=False)
        kept = gr.BrowserState("", storage_key="vft-draft", secret="settings are no secret")
        with gr.Tabs():
            for name, module in TABS.items():
                with gr.Tab(name, id=name) as tab:
                    module.build(Shared(space, draft, (page.load, tab.select)))
        # A closed browser loses nothing: the settings come back.
        page.load(lambda text: text or gr.skip(), kept, draft, show_progress="hidden")
        draft.change(lambda text: text, draft, kept, show_progress="hidden")
    return page


def look() -> dict[str, Any]:
    """Gradio's theme and CSS, with fonts of the system: others would come from a server."""
    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    sheets = (resources.files("vft.reporting") / "parts.css", resources.files("vft.app") / "page.css")
    # Not as Gradio's `css`, which would rewrite `:root`, and with it lose the dark colours.
    style = "\n".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    return {"theme": theme, "head": f"<style>{style}</style>"}
