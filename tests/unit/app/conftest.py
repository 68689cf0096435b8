"""A folder with the demo's base, a run with an adapter on it, and a clip."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.adapters import exported
from tests.helpers.clips import make_clip
from vft.app.workspace import Workspace
from vft.config.run import LoraConfig

BASE = Path(__file__).parents[3] / "tools" / "demo_world" / "base"


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder."""
    home = tmp_path_factory.mktemp("home").resolve()
    shutil.copytree(BASE, home / "base")
    run, before = home / "runs" / "mine", Path.cwd()
    os.chdir(home)
    try:
        tiny: Any = SimpleNamespace(path="base")
        exported(tiny, run / "adapter", LoraConfig(rank=4, targets=["language_model.*"]))
    finally:
        os.chdir(before)
    about = json.loads((run / "adapter" / "vft.json").read_text())
    frames = {key: json.loads((BASE / "vft.json").read_text())[key] for key in ("video", "image")}
    (run / "adapter" / "vft.json").write_text(json.dumps({**about, **frames, "prompt": "What moves?"}))
    (run / "run.json").write_text("{}")
    (run / "config.toml").write_text(
        'output_dir = "runs/mine"\n[model]\npath = "base"\n'
        '[lora]\nrank = 4\ninit = "kaiming"\ntargets = ["language_model.*"]\n[data]\nsources = []\n'
    )
    make_clip(home / "clip.mp4", range(20))
    return home


@pytest.fixture
def space(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The page's view of it."""
    monkeypatch.chdir(filled)
    return Workspace((filled,))
