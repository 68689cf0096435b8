"""Asking a model and exporting a run in the page, clicked through in a headless Chromium."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tests.browser.conftest import Browser, Server
from tests.browser.test_app import open_tab
from tests.helpers.adapters import exported
from vft.common.files import digest
from vft.config.run import LoraConfig

pytestmark = pytest.mark.slow

CARD = """---
base_model: "<script>window.ran=1</script>"
---
# A card <img src=x onerror="window.ran=2">
<script>window.ran=3</script>
[a](javascript:window.ran=4) ![b](http://elsewhere.example/b.png) ${window.ran=5} {{value}} `${window.ran=6}`
"""


def load(page: Any, adapter: str) -> None:
    open_tab(page, "Try")
    page.wait_for_timeout(2000)  # for the lists of what the folders offer, which would come over what is typed
    for label, value in (("adapter", adapter), ("model", "base")):
        field = page.locator(f"label:visible:has-text('{label}') input, input[aria-label='{label}']:visible").first
        field.fill(value)
        field.press("Enter")
    page.get_by_role("button", name="Load", exact=True).locator("visible=true").click()
    page.get_by_text("Loaded. In a terminal").wait_for()
    assert not adapter or page.get_by_text(f"--adapter {adapter}").count()


def ask(page: Any, text: str) -> None:
    page.get_by_label("question", exact=True).locator("visible=true").fill(text)
    page.get_by_role("button", name="Ask", exact=True).click()


def test_two_people_ask(browser: Browser, server: Server) -> None:
    tiny: Any = SimpleNamespace(path=server.folder / "base")
    exported(tiny, server.folder / "tuned", LoraConfig(rank=2, targets=["language_model.*"]))
    first, second = browser.open(), browser.open(390, 844, "dark")
    load(first, "tuned")
    first.locator("input[type=file]").last.set_input_files(server.folder / "data" / "red.mp4")
    first.locator(".strip:visible img").first.wait_for()
    first.get_by_label("beside its base").check()
    ask(first, "<b>What</b> is it?")
    for side in range(2):
        first.locator(".bot.message:visible").nth(side).wait_for()
    load(second, "")
    second.get_by_text("takes the place of tuned on base").wait_for()
    ask(first, "And now?")
    first.get_by_text("made place for base").first.wait_for()
    assert second.evaluate("document.documentElement.scrollWidth") == 390


def test_a_hostile_card(browser: Browser, server: Server) -> None:
    (server.folder / "out").mkdir()
    (server.folder / "out" / "README.md").write_text(CARD)
    (server.folder / "out" / "config.json").write_bytes((server.folder / "base" / "config.json").read_bytes())
    (server.folder / "out" / "model.safetensors").symlink_to(server.folder / "base" / "model.safetensors")
    job = server.folder / ".vft-app" / "jobs" / f"export-{digest(str(server.folder.resolve() / 'out'))}"
    job.mkdir(parents=True)
    (job / "job.json").write_text(json.dumps({"argv": ["vft", "merge", "--output=out"]}))
    page = browser.open()
    open_tab(page, "Export")
    page.get_by_text("A card <img").wait_for()
    page.wait_for_timeout(1000)
    assert page.evaluate("window.ran") is None
