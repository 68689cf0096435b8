"""The page: its tabs in the order of the work, and its look."""

from __future__ import annotations

from importlib import resources
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj, traverse

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


class Page(gr.Blocks):
    """Blocks that take from a browser only the files that it has uploaded. Gradio itself copies whatever file an event
    names to where the browser can fetch it, and fetches URLs, if an application is mounted and not launched."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """gr.Error if a value of an event is a file that was not uploaded."""
        traverse(inputs, _check_uploaded, is_file_obj)
        super().validate_inputs(block_fn, inputs)


def _check_uploaded(file: dict[str, Any]) -> None:
    if not is_in_or_equal(file["path"], get_upload_folder()):
        raise gr.Error("a file that was not uploaded: type its path instead", print_exception=False)


def build(space: Workspace) -> gr.Blocks:
    """The page over the folders of `space`."""
    with Page(title="vft", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
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
