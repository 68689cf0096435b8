"""What a person does in the page, clicked through in a headless Chromium."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Browser, Server
from tests.runs.commands import metrics

pytestmark = pytest.mark.slow

SETTINGS = """# small
task = "caption"
output_dir = "runs/one"

[model]
path = "base"

[lora]
rank = 4

[data]
root = "data"
sources = [{ format = "messages", path = "videos.json" }]
cache_dir = "cache"
pack_tokens = 256
workers = 0
video = { frames = 4, max_pixels = 3136 }

[train]
max_steps = 3000
packs_per_step = 2
precision = "fp32"
"""


@pytest.fixture
def settings(server: Server) -> Path:
    file = server.folder / "one.toml"
    file.write_text(SETTINGS)
    return file


def open_tab(page: Any, name: str) -> None:
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.count():  # on a narrow screen the last tabs are in a menu
        page.locator(".overflow-menu > button").click()
        tab = page.get_by_role("button", name=name, exact=True)
    tab.click()


def load(page: Any, name: str) -> None:
    """Take settings in the tab Train."""
    open_tab(page, "Train")
    field = page.get_by_label("start from a recipe or the settings of a run")
    field.fill(name)
    page.get_by_role("option", name=name, exact=True).click()
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_text("These settings are valid").wait_for()


def set_field(page: Any, key: str, value: str) -> None:
    field = page.get_by_label(re.compile(f"^\\s*{re.escape(key)}\\b")).first
    field.fill(value)
    field.press("Enter")


def badge(page: Any, word: str) -> None:
    page.locator(f".run-head .badge.{word}:visible").first.wait_for()


def test_start_watch_stop_go_on(browser: Browser, server: Server, settings: Path) -> None:
    page = browser.open()
    load(page, "one.toml")
    set_field(page, "output_dir", "runs/two words")
    page.get_by_text("The run will be runs/two words").wait_for()
    page.locator("#start").click()
    badge(page, "training")
    page.locator("svg.chart:visible").first.wait_for()
    page.locator("#stop:visible").click()
    badge(page, "stopped")
    folder = server.folder / "runs/two words"
    step = metrics(folder)[-1]["step"]
    page.get_by_text("Go on with other settings").locator("visible=true").click()
    page.get_by_label("settings that change").locator("visible=true").fill(f"train.max_steps={step + 3}")
    page.locator("#go-on:visible").click()
    badge(page, "finished")
    steps = [line["step"] for line in metrics(folder) if "loss" in line]
    assert steps == [*range(1, step + 4)] and (folder / "adapter").is_dir()
    open_tab(page, "Runs")
    page.get_by_role("cell", name="runs/two words").wait_for()
    assert SETTINGS.splitlines()[0] in (folder / "settings.toml").read_text()


def test_two_browsers_and_a_killed_page(browser: Browser, server: Server, settings: Path) -> None:
    """Two people press the same button; the page is killed, and finds the run again, which noticed nothing."""
    one, two = browser.open(), browser.open(390, 844, "dark")
    load(one, "one.toml")
    load(two, "one.toml")
    one.locator("#start").click()
    two.locator("#start").click()
    two.get_by_text(re.compile("at work already|there is a run already")).first.wait_for()
    badge(one, "training")
    server.kill()
    before = metrics(server.folder / "runs/one")[-1]["step"]
    one.wait_for_timeout(2000)
    one.close()
    two.close()
    browser.problems.clear()  # the browsers have noticed
    server.start()
    page = browser.open()
    open_tab(page, "Runs")
    page.get_by_label("run", exact=True).fill("runs/one")
    page.get_by_role("option", name="runs/one", exact=True).click()
    badge(page, "training")
    page.locator("#stop:visible").click()
    badge(page, "stopped")
    steps = [line["step"] for line in metrics(server.folder / "runs/one") if "loss" in line]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) > before


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_nothing_is_wider_than_the_screen(browser: Browser, settings: Path, width: int, scheme: str) -> None:
    page = browser.open(width, 844, scheme)
    names = page.get_by_role("tab").all_inner_texts()
    for name in names:
        open_tab(page, name)
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
