"""Data looked at, taken into the settings and planned in the page, clicked through in a headless Chromium."""

from __future__ import annotations

import time

import pytest

from tests.browser.conftest import Browser, Server
from tests.browser.test_app import open_tab
from tests.unit.app.test_plan_tab import processes_with

pytestmark = pytest.mark.slow

EVIL = "<img src=x onerror=window.ran=1> ${window.ran=2} {{value}}"


def test_a_table_with_other_columns_becomes_a_plan(browser: Browser, server: Server) -> None:
    rows = [
        f'{name}.mp4,"{EVIL.replace(chr(34), 2 * chr(34))}","<script>window.ran=3</script>"' for name in ("red", "blue")
    ]
    (server.folder / "data/odd.csv").write_text("\n".join(["clip_name,q,a", *rows, "gone.mp4,What?,Nothing."]))
    page = browser.open(390, 844, "dark")
    open_tab(page, "Data")
    page.get_by_label("files or folders of records").click()
    page.get_by_role("option", name="odd.csv", exact=True).click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Read", exact=True).click()
    page.get_by_text("answer is missing").or_(page.get_by_text("is missing; a record has")).first.wait_for()
    for name, key in (("video", "clip_name"), ("question", "q"), ("answer", "a")):
        page.get_by_label(f"{name} =", exact=True).fill(key)
        page.keyboard.press("Enter")
    page.get_by_role("button", name="Read", exact=True).click()
    page.get_by_text("1 of 3 files").wait_for()
    page.get_by_role("button", name="Show as the model sees them").click()
    page.locator("#seen .card img").first.wait_for()
    page.get_by_role("button", name="Decode all clips").click()
    page.locator("#seen .bad", has_text="What is wrong: 1").wait_for()
    page.get_by_role("button", name="Write to the settings").click()
    page.get_by_text("none of 3 samples is held out; raise it, or write it as 0").wait_for()
    page.get_by_label("hold out").fill("0")
    page.get_by_role("button", name="Write to the settings").click()
    page.get_by_text("next: the tabs Plan and Train").wait_for()
    open_tab(page, "Plan")
    page.get_by_role("button", name="Plan", exact=True).click()
    page.get_by_text("counting,").wait_for()
    page.get_by_role("button", name="Stop", exact=True).click()
    until = time.monotonic() + 20
    while processes_with(f"{server.folder}/.vft-app/plan-"):
        assert time.monotonic() < until
        time.sleep(0.2)
    page.get_by_role("button", name="Plan", exact=True).click()
    page.locator("#planned .memory").wait_for()
    page.get_by_text("auto takes activation_checkpointing").wait_for()
    assert page.evaluate("[window.ran ?? null, document.documentElement.scrollWidth]") == [None, 390]
