"""`vft new`: the skeletons pass the project's checks, and are found as `module:Class`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.main import run_main
from vft.cli import new
from vft.common.task import Answer, Question
from vft.common.types import Conversation, MediaRef, Sample, Turn
from vft.config.data import DataConfig, SourceConfig
from vft.data import formats
from vft.recipes import load_task

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that no other test has imported, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return f"own_{tmp_path.name.rstrip('0123456789')}"


def test_a_task(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    new.main(["task", module])
    name = f"{module}:{new.class_name(module)}"
    assert f"vft train {name} CONFIG.toml" in capsys.readouterr().out
    task = load_task(name)
    turns = (Turn("user", (MediaRef("video", Path("a.mp4")),)), Turn("assistant", ("A dog.",)))
    (conversation,) = task.conversations(Sample("1", turns, "train.jsonl:1"))
    assert isinstance(conversation, Conversation) and task.prompt in conversation.turns[0].text
    answers = [Answer(Question(text, conversation, (text,)), text) for text in ("A dog.", "Two cats.")]
    assert task.name == name and task.score(answers)[task.main_metric].value > 1


def test_a_format(module: str, tmp_path: Path) -> None:
    new.main(["format", module])
    (tmp_path / "a.mp4").touch()
    lines = [{"clip": "a.mp4", "text": "A dog."}, {"clip": "gone.mp4", "text": "A cat."}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = SourceConfig(format=f"{module}:{new.class_name(module)}", path="train.jsonl")
    samples, _ = formats.read(source, DataConfig(root=tmp_path))
    assert samples[0].turns[1].text == "A dog."


@pytest.mark.parametrize(
    "check",
    [
        ("ruff", "check", "--no-cache", "--config"),
        ("ruff", "format", "--no-cache", "--check", "--config"),
        pytest.param(("mypy", "--cache-dir", REPOSITORY / ".mypy_cache", "--config-file"), marks=pytest.mark.slow),
    ],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_the_skeletons_pass_the_projects_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: tuple[object, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in new.NEXT_STEP:
        new.main([kind, f"my_{kind}"])
    command = (sys.executable, "-m", *check, REPOSITORY / "pyproject.toml", "my_task.py", "my_format.py")
    environment = {"MYPYPATH": str(REPOSITORY)}
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("name", "message"), [("9lives", "must be the name"), ("class", "must be the name")])
def test_names_that_are_no_modules(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in run_main(new.main, capsys, "task", name).error


def test_a_file_that_exists_is_kept(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"{module}.py").write_text("mine")
    assert "exists" in run_main(new.main, capsys, "format", module).error
    assert (tmp_path / f"{module}.py").read_text() == "mine"
