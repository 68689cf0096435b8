"""TensorBoard and Weights & Biases: the figures of metrics.jsonl, under their names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands, metrics
from tests.runs.world import World

SCORED: dict[str, Any] = {
    "train": {"max_steps": 4},
    "checkpoint": {"every_steps": 2},
    "eval": {"every_steps": 2, "max_new_tokens": 8},
}
PROGRAM = """
from vft.recipes.main import main

if __name__ == "__main__":
    main("caption")
"""
STAND_IN = """
import json, os

class errors:
    class Error(Exception):
        pass

class Settings:
    def __init__(self, **settings):
        self.settings = settings

class Run:
    def log(self, values, step):
        note({"values": values, "step": step})

    def finish(self):
        note({"finish": True})

def note(what):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps(what) + "\\n")

def init(settings, **arguments):
    if os.environ.get("WANDB_FAILS"):
        raise errors.Error("api_key not configured (no-tty)\\nmore")
    note({"init": arguments, "settings": settings.settings})
    return Run()
"""
"""The part of the package that is used, as its documentation has it (docs.wandb.ai/ref/python); it notes all calls."""


def figures(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Of each line of metrics.jsonl its numbers."""
    lines = metrics(folder)
    return [(line["step"], {k: v for k, v in line.items() if isinstance(v, int | float)}) for line in lines]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The caption recipe as a script; what lies beside it can be imported."""
    file = tmp_path / "beside" / "caption.py"
    file.parent.mkdir()
    file.write_text(PROGRAM)
    return file


def test_wandb_gets_what_metrics_says(world: World, commands: Commands, tmp_path: Path, program: Path) -> None:
    (program.parent / "wandb.py").write_text(STAND_IN)
    config = world.config(tmp_path / "mine.toml", SCORED, {"log": {"wandb": True, "wandb_project": "videos"}})
    calls_file = tmp_path / "calls"
    commands.run(str(program), config, WANDB_CALLS=str(calls_file)).ok()
    more = ("train.max_steps=6", "log.wandb_run=other")
    commands.run(str(program), config, *more, WANDB_CALLS=str(calls_file)).ok()
    calls = [json.loads(line) for line in calls_file.read_text().splitlines()]
    first, again = (one["init"] for one in calls if "init" in one)
    assert (first["project"], first["name"], again["name"]) == ("videos", "mine", "other")
    assert first["id"] == again["id"] and first["resume"] == "allow" and first["dir"] == str(tmp_path / "mine")
    assert first["config"]["train"]["max_steps"] == 4 and first["config"]["lora"]["rank"] == 4
    logged = [(one["step"], one["values"]) for one in calls if "values" in one]
    assert logged == figures(tmp_path / "mine") and {"eval_rouge_l", "eval_loss"} <= logged[0][1].keys()
    assert [one for one in calls if "finish" in one] == [{"finish": True}] * 2 and "finish" in calls[-1]


def test_wandb_that_is_missing(world: World, commands: Commands, tmp_path: Path, program: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("it is installed")
    (program.parent / "wandb").mkdir()  # as W&B leaves one in the current folder: no package
    config = world.config(tmp_path / "run.toml", SCORED, {"log": {"wandb": True}})
    missing = commands.run(str(program), config).error
    assert missing == "error: log.wandb = true: not installed; pip install 'vft[wandb]', or leave it out"
    assert not (tmp_path / "run").exists()


def test_wandb_that_refuses(world: World, commands: Commands, tmp_path: Path, program: Path) -> None:
    (program.parent / "wandb.py").write_text(STAND_IN)
    config = world.config(tmp_path / "run.toml", SCORED, {"log": {"wandb": True}})
    refused = commands.run(str(program), config, WANDB_FAILS="1").error
    assert refused.startswith("error: log.wandb = true: api_key not configured (no-tty); `wandb login`, or WANDB_MODE=")


def test_tensorboard_gets_what_metrics_says(world: World, commands: Commands, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = world.config(tmp_path / "run.toml", SCORED, {"log": {"tensorboard": True}})
    commands.train(config)
    commands.train(config, "train.max_steps=6")
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    wanted: dict[str, list[tuple[int, float]]] = {}
    for step, values in figures(tmp_path / "run"):
        for name, value in values.items():
            wanted.setdefault(name, []).append((step, value))
    assert set(board.Tags()["scalars"]) == set(wanted)
    for name, values in wanted.items():
        found = [(one.step, one.value) for one in board.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in values]
        assert [value for _, value in found] == pytest.approx([value for _, value in values], rel=1e-6)
