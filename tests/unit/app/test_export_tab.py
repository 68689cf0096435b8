"""The tab Export: jobs of `vft export` and `vft merge`, each folder written once, and cards that can't do anything."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from vft.app.export_tab import KINDS, NEWEST, Export, rendered, target_of
from vft.app.jobs import Job
from vft.app.workspace import Workspace
from vft.cli import main
from vft.common.errors import UserError

RUN = "runs/mine"


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What jobs were started with, as `vft` gets it."""
    started: list[list[str]] = []

    def start(job: Job, argv: list[str], *_: Any) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "job.json").write_text(json.dumps({"argv": argv}))
        started.append(argv[argv.index("vft.cli.main") + 1 :])

    monkeypatch.setattr(Job, "start", start)
    return started


def test_a_merged_model_with_its_card_and_commands(space: Workspace, words: list[list[str]]) -> None:
    tab = Export(space)
    assert tab.steps(RUN)[1] == "base"
    name = tab.folder(RUN, NEWEST, KINDS[1])
    tab.start(RUN, NEWEST, KINDS[1], "base", name)
    main.main(words[0])
    log, lines, card, timer = tab.look(name)
    assert "<h1>base, tuned for caption</h1>" in card and not timer.active and log == ""
    assert f"vft predict --model {name} clip.mp4\n" in lines.value and f"\nvllm serve {name} " in lines.value
    with pytest.raises(UserError, match="is there already"):
        tab.start(RUN, NEWEST, KINDS[1], "base", name)


def test_commands(space: Workspace, words: list[list[str]], filled: Path) -> None:
    tab, run = Export(space), filled / RUN
    with pytest.raises(UserError, match="has no such checkpoint"):
        tab.start(RUN, "2", KINDS[1], "", "new")
    (run / "checkpoints" / "step-000002").mkdir(parents=True)
    (run / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    assert [value for _, value in tab.steps(RUN)[0].choices] == [NEWEST, "2"]
    tab.start(RUN, "2", KINDS[1], "", "new")
    tab.start(RUN, "2", KINDS[0], f"{filled}/base", "new")
    assert words == [
        ["merge", "--base=base", f"--adapter={RUN}/checkpoints/step-000002", "--output=new"],
        ["export", RUN, "--output=new", "--step=2", f'model.path="{filled}/base"'],
    ]
    for output in ("../new", ""):
        with pytest.raises(UserError, match="new folder"):
            tab.start(RUN, NEWEST, KINDS[0], "", output)
    with pytest.raises(UserError, match="is no run's folder"):
        tab.start("base", NEWEST, KINDS[0], "", "new")


def test_two_windows_write_once(space: Workspace) -> None:
    tab = Export(space)
    job = tab.job("new")
    job.folder.mkdir(parents=True, exist_ok=True)
    with (job.folder / "job.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as the job that another window has started
        (job.folder / "job.json").write_text('{"argv": ["vft", "export", "runs/mine", "--output=new"]}')
        assert tab.look("new")[3].active and tab.names()[0] == "new"
        with pytest.raises(UserError, match="at work already"):
            tab.start(RUN, NEWEST, KINDS[0], "", "./new")
    assert "wrote nothing" in tab.look("new")[0] and target_of({"argv": 3}) == ""


def test_a_card_cannot_do_anything() -> None:
    shown = rendered(
        '---\nbase_model: "<script>1</script>"\n---\n# A <img src=x onerror=1>\n<script>2</script>\n\n'
        "[a](javascript:3) [b](data:text/html,4) ![c](http://elsewhere/c.png)\n\n"
        "| a |\n|---|\n| <b> |\n\n```\n<i>\n```\n"
    )
    for bad in ("<script", "<img", "<b>", "<i>", 'href="javascript', 'href="data'):
        assert bad not in shown
    assert "<table>" in shown and "<pre><code>&lt;i&gt;" in shown and "&lt;script&gt;1" in shown
