"""What a user adds outside the package: a format by the steps of docs/develop/new_format.md, and a task."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.runs.commands import CAPTION, REPOSITORY, Commands, metrics
from tests.runs.world import COLOURS, World
from vft.data import formats

GUIDE = REPOSITORY / "docs" / "develop" / "new_format.md"


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """A folder of the user's with a data set, and the guide's file."""
    (tmp_path / "data").mkdir()
    lines = []
    for colour in COLOURS:
        shutil.copyfile(world.root / f"{colour}.mp4", tmp_path / "data" / f"{colour}.mp4")
        lines.append({"clip": f"{colour}.mp4", "says": f"It is {colour}.", "take": 7})
    lines.append({"clip": "../secret.mp4", "says": "No."})
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    block = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    (tmp_path / "my_clips.py").write_text(re.sub(r"^ {3}", "", block[1], flags=re.MULTILINE))
    return tmp_path


def config_of(world: World, folder: Path, format: str) -> Path:
    source = {"format": format, "path": "train.jsonl"}
    data = {"root": "data", "sources": [source], "max_bad_fraction": 0.5}
    return world.config(folder / "run.toml", {"data": data, "train": {"max_steps": 2}})


def test_a_format_of_ones_own(world: World, commands: Commands, folder: Path) -> None:
    """One file is added; nothing of vft is touched."""
    before = {path.name for path in folder.iterdir()}
    config = config_of(world, folder, "my_clips:MyClips")
    assert before == {"data", "my_clips.py"}
    inspect = commands.run(
        str(REPOSITORY / "tools" / "inspect_batch.py"), config, "--output", folder / "look", cwd=folder
    ).ok()
    assert "keys that are not read, of 4 records: take (4)" in inspect.stderr
    preview = re.sub(r"<[^>]*>", "", (folder / "look" / "preview.html").read_text())
    assert any(f"It is {colour}." in preview for colour in COLOURS)
    assert "These can't be used:" in preview and "leads to" in preview
    commands.run(CAPTION, config, cwd=folder).ok()
    assert len(metrics(folder / "run")) == 2
    (bad,) = [json.loads(line) for line in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert bad["id"] == "train.jsonl:5" and "leads to" in bad["message"]


def test_a_task_of_ones_own(world: World, commands: Commands, tmp_path: Path) -> None:
    """A task of the current folder, with a field of its own, is trained, scored by its own metric and exported."""
    name = "my_task:MyTask"
    commands.run("vft.cli.main", "new", "task", "my_task", cwd=tmp_path).ok()
    text = (tmp_path / "my_task.py").read_text()
    for before, after in (
        ('main_metric = "cider_d"', 'main_metric = "length"'),
        ("return scores", 'return {"length": Interval.point(float(len(answers)))}'),
    ):
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "my_task.py").write_text(text)
    settings = {"train": {"max_steps": 2}, "eval": {"every_steps": 2, "max_new_tokens": 2, "best_metric": "length"}}
    config = world.config(tmp_path / "run.toml", settings)
    commands.run("vft.recipes", name, config, cwd=tmp_path).ok()
    *_, line = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["eval_length"] == len(COLOURS) and "eval_rouge_l" not in line
    assert json.loads((tmp_path / "run" / "best" / "vft.json").read_text())["task"] == name


def test_a_format_of_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file in the folder of formats is one by its name alone."""
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(folder)])
    formats.find.cache_clear()
    assert "my_clips" in formats.names() and type(formats.find("my_clips")).__name__ == "MyClips"
    formats.find.cache_clear()


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("my_clip:MyClips", "cannot import my_clip: No module named 'my_clip'; looked in the current folder"),
        ("my_clips:MyClip", "my_clips has no class 'MyClip'"),
        ("my_clips:MediaRef", "MediaRef is not a subclass of vft.data.formats.Format"),
        ("sharegpt", "sharegpt is read by 'messages'"),
        ("mesages", "must be one of 'dense_captions', 'folders', "),
    ],
)
def test_a_format_that_is_not_there(world: World, commands: Commands, folder: Path, format: str, message: str) -> None:
    """One line with the file, the key and the value, before anything is loaded."""
    error = commands.run(CAPTION, config_of(world, folder, format), cwd=folder).error
    assert error.startswith(f"error: {folder}/run.toml: data.sources.0.format = ") and message in error
