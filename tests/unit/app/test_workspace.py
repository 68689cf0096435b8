"""Nothing outside the chosen folders is named, and settings bring neither code nor servers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from vft.app.workspace import Workspace
from vft.common.errors import UserError
from vft.config import run as configs


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    for folder in ("home/base", "home/runs", "more", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "home/base/config.json").write_text("{}")
    (tmp_path / "elsewhere/config.json").write_text("{}")
    (tmp_path / "home/out").symlink_to(tmp_path / "elsewhere")
    return Workspace((tmp_path / "home", tmp_path / "more"))


@pytest.mark.parametrize(
    "name", ["..", "../elsewhere/x", "/etc/passwd", "out/x", "runs/../../elsewhere", "~root/x", "../homes"]
)
def test_paths_stay_inside(space: Workspace, name: str) -> None:
    with pytest.raises(UserError, match="lies outside"):
        space.path(name)


def test_paths_inside(space: Workspace) -> None:
    home, more = space.folders
    assert space.path("runs/a") == home / "runs/a" and space.shown(home / "runs/a") == "runs/a"
    assert space.path(str(more / "b")) == more / "b" and space.shown(more / "b") == str(more / "b")
    for name in ("", " ", "a\0b", "\ud800"):
        with pytest.raises(UserError, match="is empty"):
            space.path(name)
    with pytest.raises(UserError, match=r"data\.root = 'nothing': there is no file"):
        space.existing("nothing", "data.root")


SOURCE = {"format": "messages", "path": "a.jsonl"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, ""),
        ({"output_dir": "../out"}, "output_dir = '../out': lies outside"),
        ({"model": {"path": "../elsewhere"}}, "model = '../elsewhere': lies outside"),
        ({"model": {"path": "out"}}, "lies outside"),
        ({"model": {"path": "nobody/nothing"}}, "was not downloaded"),
        ({"model": {"path": "runs"}}, "no config.json"),
        ({"model": {"path": "no name/of a hub"}}, "was not downloaded"),
        ({"model": {"path": "base", "adapter": "/x"}}, "model.adapter = '/x': lies outside"),
        ({"data": {"root": "/"}}, "data.root = '/': lies outside"),
        ({"data": {"cache_dir": "/tmp/x"}}, "data.cache_dir"),
        ({"data": {"sources": [SOURCE | {"path": "../../x.jsonl"}]}}, "data.sources.path"),
        ({"eval": {"sources": [SOURCE | {"path": "/etc/x.jsonl"}]}}, "eval.sources.path"),
        ({"data": {"sources": [{"format": "kinetics", "path": "a.csv", "media": "/etc"}]}}, "data.sources.media"),
        ({"task": "posixpath:join"}, "task = 'posixpath:join': is code of its own"),
        ({"log": {"wandb": True}}, "log.wandb = true: sends figures"),
    ],
)
def test_settings(space: Workspace, settings: dict[str, Any], says: str) -> None:
    base = {"output_dir": "runs/a", "model": {"path": "base"}, "lora": {}, "data": {"sources": [SOURCE]}}
    config = configs.load(base | settings)
    if says:
        with pytest.raises(UserError, match=says):
            space.check(config)
    else:
        space.check(config)


def test_what_lies_in_the_folders_is_found_once(space: Workspace) -> None:
    home, _ = space.folders
    (home / "base/model.safetensors").touch()
    (home / "runs/a/adapter").mkdir(parents=True)
    for name in ("config.toml", "run.json", "adapter/adapter_config.json"):
        (home / "runs/a" / name).write_text("output_dir = 'runs/a'\nmodel.path = 'base'")
    (home / ".hidden").mkdir()
    (home / ".hidden/config.json").touch()
    twice = Workspace((home, home / "runs"))
    assert twice.models() == ["base"] and twice.adapters() == ["runs/a/adapter"]
    assert twice.runs() == [home / "runs/a"] and twice.configurations() == ["runs/a/config.toml"]


def test_what_can_not_be_read_or_shown_is_left_out(space: Workspace) -> None:
    home, _ = space.folders
    (home / "good.toml").write_text("output_dir = 'x'\n[model]")
    os.mkfifo(home / "pipe.toml")  # reading it would never end
    (home / "folder.toml").mkdir()
    (home / "gone.toml").symlink_to("nowhere")
    (home.parent / "elsewhere/outside.toml").write_text("output_dir = 'x'\n[model]")
    (home / "link.toml").symlink_to(home.parent / "elsewhere/outside.toml")
    for name in (b"\xe9.toml", b"\xe9"):  # no UTF-8, as in old archives
        os.mkdir(os.fsencode(home) + b"/" + name)
    assert space.configurations() == ["good.toml"]
    assert all(str(folder).isascii() for folder in space.walk())
    with pytest.raises(UserError, match="no file or folder"):
        space.existing("pipe.toml")


def test_links_in_a_run_stay_inside(space: Workspace) -> None:
    home, _ = space.folders
    run = home / "runs/a"
    (run / "predictions").mkdir(parents=True)
    (run / "job.json").write_text("{}")
    (run / "best").symlink_to(run / "predictions")
    assert space.run("runs/a") == run
    (run / "job.log").symlink_to(home.parent / "elsewhere/log")  # what the page starts there writes to it
    with pytest.raises(UserError, match=r"job\.log': lies outside"):
        space.run("runs/a")
