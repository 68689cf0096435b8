"""Runs that the page starts: ordinary run folders, started once, stopped with a checkpoint, gone on with."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.commands import metrics
from tests.runs.world import World
from vft.app import run_view, runs, runs_tab
from vft.app.jobs import Job
from vft.app.workspace import Workspace
from vft.common.errors import UserError


@pytest.fixture
def space(world: World, tmp_path: Path) -> Iterator[Workspace]:
    yield Workspace((tmp_path, world.root.parent))
    for lock in tmp_path.glob("*/job.lock"):  # whatever a failed test has left at work
        if Job(lock.parent).is_alive:
            Job(lock.parent).stop(at_once=True)


def wait_for(folder: Path, *words: str) -> runs.Status:
    end = time.monotonic() + 120
    while (now := runs.status(folder)).word not in words:
        assert time.monotonic() < end and now.word not in ("failed", "finished"), (now.word, Job(folder).tail())
        time.sleep(0.1)
    return now


def test_start_stop_go_on(world: World, space: Workspace, tmp_path: Path) -> None:
    cache = {"data": {"cache_dir": str(tmp_path / "cache")}}
    text = world.config(tmp_path / "run.toml", {"train": {"max_steps": 5000}}, cache).read_text()
    folder = runs.start(space, text, 1, "")
    assert runs.status(folder).word == "starting" and space.runs() == [folder]
    with pytest.raises(UserError, match=r"at work already|there is a run already"):
        runs.start(space, text, 1, "")
    wait_for(folder, "training")
    with pytest.raises(UserError, match="there is a run already"):
        runs.start(space, text, 1, "")
    Job(folder).stop()
    assert runs.status(folder).word in ("stopping", "stopped")
    stopped = wait_for(folder, "stopped")
    step = stopped.state.line["step"]
    assert 0 < step < 5000 and (folder / f"checkpoints/step-{step:06d}").is_dir()
    with pytest.raises(UserError, match="command line: lora"):
        runs.go_on(space, folder, ["lora.rank=0"], 1, "")
    runs.go_on(space, folder, [f"train.max_steps={step + 2}"], 1, "")
    end = time.monotonic() + 120
    while runs.status(folder).is_alive:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert runs.status(folder).word == "finished", Job(folder).tail()
    steps = [line["step"] for line in metrics(folder) if "loss" in line]
    assert steps == [*range(1, step + 3)] and (folder / "adapter").is_dir() and (folder / "report.html").is_file()
    visible, head, _, _, _, curves, *_ = run_view.shown(space, str(folder), "")
    assert visible.visible and "finished" in head and "<svg" in curves


def test_a_folder_with_something_else_is_left_alone(world: World, space: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/settings.toml").write_text("my own")
    text = world.config(tmp_path / "run.toml").read_text().replace(str(tmp_path / "run"), str(tmp_path / "mine"))
    with pytest.raises(UserError, match="holds something else"):
        runs.start(space, text, 1, "")
    assert (tmp_path / "mine/settings.toml").read_text() == "my own"


@pytest.mark.parametrize(
    "files",
    [
        {"run.json": "[]"},
        {"run.json": "{}"},
        {"run.json": "[" * 99999},
        {"metrics.jsonl": "garbage\n[1]\n"},
        {"metrics.jsonl": '{"step": 1, "loss": "x"}\n'},
        {"config.toml": "\0"},
    ],
)
def test_a_damaged_run_hides_no_others(world: World, space: Workspace, tmp_path: Path, files: dict[str, str]) -> None:
    """They come from elsewhere, or their disk was full."""
    whole = {"run.json": '{"started": "2026-01-01T00:00:00+00:00"}', "metrics.jsonl": ""}
    for name in ("whole", "damaged"):
        (tmp_path / name).mkdir()
        text = world.config(tmp_path / "run.toml").read_text()
        for file, content in {"config.toml": text, **whole, **(files if name == "damaged" else {})}.items():
            (tmp_path / name / file).write_text(content)
    table = runs_tab.table_html(space, [tmp_path / "damaged", tmp_path / "whole"])
    assert "damaged" in table and "<td>elsewhere</td>" in table


def test_a_run_that_fails_says_why(world: World, space: Workspace, tmp_path: Path) -> None:
    """And can be started again in its folder, because no run began there."""
    broken = {
        "data": {"cache_dir": str(tmp_path / "cache"), "sources": [{"format": "messages", "path": "nothing.json"}]}
    }
    text = world.config(tmp_path / "run.toml", broken).read_text()
    folder = runs.start(space, text, 1, "")
    end = time.monotonic() + 60
    while runs.status(folder).is_alive:
        assert time.monotonic() < end
        time.sleep(0.1)
    now = runs.status(folder)
    assert now.word == "failed" and "nothing.json" in now.text
    assert "nothing.json" in run_view.log_html(folder)
    Job(folder).start(["true"], tmp_path, {})  # the folder is not taken


def test_a_run_of_a_terminal(learned: Path, tmp_path: Path) -> None:
    """What the page says of one that it did not start: by the run's own files."""
    folder = shutil.copytree(learned, tmp_path / "run")
    assert runs.status(folder).word == "finished"
    (folder / ".ended").write_text("stopped by SIGINT; the same command goes on\n")
    assert runs.status(folder).word == "stopped" and "SIGINT" in runs.status(folder).text
    (folder / ".ended").write_text("failed: out of memory\n")
    assert runs.status(folder).word == "failed"
