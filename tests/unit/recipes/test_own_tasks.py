"""Tasks by name: those of the package, and `module:Class` from the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vft.common.errors import UserError
from vft.config import run as configs
from vft.config.data import DataConfig
from vft.config.run import Config, ModelConfig
from vft.recipes import TASKS, load_task, task_of
from vft.recipes import main as recipes

OWN = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Count:
    prompt: str = "How many?"
    threshold: float = 0.5
    name = "count"
    main_metric = "exact"

    def conversations(self, sample):
        return []

    def score(self, answers):
        return {}

@dataclass
class Silent:
    prompt: str = "?"

class Plain:
    prompt = "?"

@dataclass
class Demanding:
    prompt: str
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder that no other test has imported."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    (tmp_path / f"{name}_broken.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return name


def config(task: str, prompt: str = "") -> Config:
    model = ModelConfig(path="base")
    return Config(task=task, output_dir=Path("runs/x"), model=model, data=DataConfig(prompt=prompt))


def test_names_of_the_package_are_those_of_the_configuration() -> None:
    assert tuple(TASKS) == configs.TASKS and [load_task(name).name for name in TASKS] == list(TASKS)


def test_a_task_of_the_current_folder(module: str) -> None:
    """`data.prompt` replaces its prompt; fields of its own keep their defaults."""
    task = task_of(config(f"{module}:Count", prompt="How often?"))
    assert (task.name, task.prompt, task.threshold) == ("count", "How often?", 0.5)  # type: ignore[attr-defined]
    assert task_of(config(f"{module}:Count")).prompt == "How many?"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("counting", "must be caption, qa, classify, summarize, story, ground, or module:Class"),
        ("{module}:Nothing", "{module} has no class 'Nothing'"),
        ("{module}:OWN", "{module} has no class 'OWN'"),
        ("{module}:Plain", "Plain must be a dataclass"),
        ("{module}:Silent", "Silent has no name, main_metric, conversations, score"),
        ("{module}:Demanding", "give every field a default"),
        ("{module}_broken:Count", "cannot import {module}_broken: No module named 'a_package_that_is_missing'"),
        ("no_such_module:Count", "cannot import no_such_module: No module named 'no_such_module'"),
    ],
)
def test_a_bad_name_is_one_line(module: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_task(name.format(module=module))
    assert message.format(module=module) in str(refused.value) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["captions", "a:", ":A", "a b:C", "../a:B"])
def test_the_configuration_checks_the_form(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be caption, qa, .* or module:Class for a task of your own"):
        config(name)


@pytest.mark.parametrize("words", ["run.toml seed=3", "run.toml --dry-run seed=3", "qa run.toml seed=3"])
def test_the_task_may_be_left_to_the_configuration(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = '[model]\npath = "m"\n[data]\nroot = "."\nsources = [{ format = "messages", path = "a.jsonl" }]\n'
    Path("run.toml").write_text(f'task = "qa"\noutput_dir = "run"\n{text}')
    called: list[tuple[int, str]] = []
    monkeypatch.setattr(recipes, "train_config", lambda config, task, dry: called.append((config.seed, task)))
    recipes.main(argv=words.split())
    assert called == [(3, "qa")]


def test_no_task_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('output_dir = "run"\n[model]\npath = "m"\n')
    with pytest.raises(SystemExit) as stopped:
        recipes.main(argv=["run.toml"])
    assert stopped.value.code == 2
    assert "run.toml: no task there; name it, vft train TASK run.toml: caption, qa" in capsys.readouterr().err
