"""`vft export`, and a run or a checkpoint in the place of an adapter, beside what the run itself writes at its end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands
from tests.runs.world import FULL_TUNING, World

SETTINGS = {"train": {"max_steps": 2}, "checkpoint": {"every_steps": 1}}
slow = pytest.mark.slow


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the card, which names its own folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, id="lora"),
        pytest.param({"lora": {"dora": True}}, id="dora", marks=slow),
        pytest.param({"lora": {"init": "pissa"}}, id="pissa", marks=slow),
        pytest.param(FULL_TUNING, id="full", marks=slow),
    ],
)
def test_the_last_checkpoint_holds_what_the_run_exports(
    world: World, commands: Commands, tmp_path: Path, kind: dict[str, Any]
) -> None:
    run = commands.train(world.config(tmp_path / "run.toml", SETTINGS, kind))
    own = run / ("model" if kind is FULL_TUNING else "adapter")
    written = contents(own)
    shutil.rmtree(own)  # as if it had been stopped
    own = run.rename(tmp_path / "moved") / own.name
    run = own.parent
    assert commands.run("tools/export.py", run).ok().stdout == f"{own}\n"
    assert contents(own) == written and (own / "README.md").is_file()
    assert commands.run("tools/export.py", run, "--step", 1).ok().stdout == f"{run / 'exports' / 'step-000001'}\n"
    assert contents(run / "exports" / "step-000001") != written


def test_a_run_and_a_checkpoint_are_adapters(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", SETTINGS)
    run = commands.train(config)
    first, last = (run / "checkpoints" / f"step-00000{step}" for step in (1, 2))

    def ask(adapter: Path) -> list[str]:
        return ["--model", str(world.base), "--adapter", str(adapter), "--json", str(world.root / "red.mp4")]

    assert commands.run("tools/predict.py", *ask(run)).ok() == commands.run("tools/predict.py", *ask(run / "adapter"))
    for folder, kind in ((run, "a run's"), (run / "adapter", "an adapter's")):
        line = commands.run("tools/predict.py", "--model", folder, world.root / "red.mp4").error
        assert f"it is {kind}" in line and "give it as the adapter" in line
    merge = ["--base", world.base, "--adapter", last, "--output"]
    commands.run("tools/merge_lora.py", *merge, tmp_path / "merged").ok()
    assert contents(run / "exports" / last.name) == contents(run / "adapter")
    other = world.config(tmp_path / "other.toml", {"model": {"adapter": str(run)}, "train": {"max_steps": 1}})
    assert f'adapter = "{run / "adapter"}"' in (commands.train(other) / "config.toml").read_text()

    shutil.rmtree(run / "adapter")
    line = commands.run("tools/predict.py", *ask(run)).error
    assert line.endswith(f"the run has no adapter yet; `vft export {run}` makes one of its newest checkpoint")
    line = commands.run("tools/export.py", run, "--step", 7).error
    assert line == f"error: --step = 7: {run} has no such checkpoint; it has 1, 2"
    (last / "trainable.safetensors").write_bytes(b"")
    assert "step-000002: trainable.safetensors is not" in commands.run("tools/export.py", run, "--step", 2).error
    commands.run("tools/export.py", run).ok()  # of the newest whole one
    assert commands.run("tools/export.py", run, "--step", 1, "--output", tmp_path / "one").ok()
    assert contents(run / "adapter") == contents(tmp_path / "one")
    assert "isn't empty" in commands.run("tools/export.py", run, "--output", tmp_path / "one").error
    line = commands.run("tools/export.py", run, "--output", tmp_path / "two", f"model.path={world.other_base}").error
    assert "other weights than the run began with" in line
    shutil.rmtree(first.parent)
    assert "no checkpoint; a run writes one every" in commands.run("tools/export.py", run).error
