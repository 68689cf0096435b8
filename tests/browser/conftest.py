"""The page in a headless Chromium. Needs the packages of the extra `app`, Playwright, and a Chromium on the path."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.runs.fixtures import world
from tests.runs.world import World

TOKEN = "token-of-the-browser-tests"
__all__ = ["world"]


@dataclass
class Server:
    """`vft app` as a process."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None
    address: str = ""

    def start(self) -> None:
        """Start it, at the same address as before."""
        words = ["-m", "vft.cli.main", "app", "--folder", str(self.folder), "--port", str(self.port), "--token", TOKEN]
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *words], cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().removeprefix("open ").strip()
        self.port = int(self.address.partition("/?")[0].rpartition(":")[2])

    def kill(self) -> None:
        """As a machine would that runs out of memory."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass
class Browser:
    """Opens pages, and notes what they complain about."""

    browser: Any
    server: Server
    problems: list[str] = field(default_factory=list)

    def open(self, width: int = 1280, height: int = 900, scheme: str = "light") -> Any:
        """The page in a browser of its own."""
        page = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda said: said.type == "error" and self.problems.append(f"console: {said.text}"))
        page.on("pageerror", lambda error: self.problems.append(f"script: {error}"))
        page.on("request", lambda request: self.check_request(request.url))
        page.goto(self.server.address)
        page.wait_for_selector("[role=tab]")
        return page

    def check_request(self, address: str) -> None:
        """Note a request that leaves the machine."""
        if not address.startswith((f"http://localhost:{self.server.port}/", "data:", "blob:")):
            self.problems.append(f"request: {address}")


@pytest.fixture
def server(world: World, tmp_path: Path) -> Iterator[Server]:
    """The page over a folder with a base, clips and settings."""
    shutil.copytree(world.root, tmp_path / "data")
    shutil.copytree(world.base, tmp_path / "base")
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()
    for record in tmp_path.rglob("job.json"):
        from vft.app.jobs import Job

        if Job(record.parent).is_alive:
            Job(record.parent).stop(at_once=True)


@pytest.fixture
def browser(server: Server) -> Iterator[Browser]:
    """A browser; the test fails if a page of it complained, or asked another machine."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("no chromium on the path")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        browser = Browser(started, server)
        yield browser
        started.close()
    assert browser.problems == []
