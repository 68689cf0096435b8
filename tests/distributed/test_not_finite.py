"""A loss or a gradient that is no number, in one process of two: all of them leave the step out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import CAPTION, Commands, metrics
from tests.runs.processes import run_together
from tests.runs.world import World

SCRIPT = str(Path(__file__).with_name("disturbed.py"))
SETTINGS: dict[str, Any] = {
    "train": {"max_steps": 5, "packs_per_step": 2},
    "checkpoint": {"every_steps": 1, "keep_last": 0},
}


def state(folder: Path, step: int) -> dict[str, bytes]:
    """The trained weights and the optimizer's state after a step; one file or one of each process."""
    files = (folder / "checkpoints" / f"step-{step:06d}").glob("*.safetensors")
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_one_process_of_two(world: World, commands: Commands, tmp_path: Path, value: str) -> None:
    config = world.config(tmp_path / "run.toml", SETTINGS)
    environment = {"NOT_FINITE": "2,3", "NOT_FINITE_ON": "1", "VALUE": value}
    ended = run_together(commands, 2, SCRIPT, config, **environment)
    assert [one.status for one in ended] == [0, 0], [one.stderr[-2000:] for one in ended]
    folder = tmp_path / "run"
    assert state(folder, 1) == state(folder, 2) == state(folder, 3) != state(folder, 4)
    lines = {line["step"]: line for line in metrics(folder)}
    assert [lines[step]["grad_norm"] is None for step in range(1, 6)] == [False, True, True, False, False]
    said = [line for line in ended[0].stderr.splitlines() if "not finite; nothing was updated" in line]
    assert len(said) == 2 and "Samples of this step: " in said[0] and "Traceback" not in ended[0].stderr
    # The steps that count see the samples that they would have seen.
    plain = commands.train(world.config(tmp_path / "plain.toml", SETTINGS))
    assert [line["sample_digest"] for line in metrics(plain)] == [line["sample_digest"] for line in lines.values()]


def test_the_third_in_a_row_ends_the_run(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", SETTINGS)
    ended = commands.run(SCRIPT, config, NOT_FINITE="1,3,4,5")
    line = ended.error
    assert "step 5: loss nan" in line and "third in a row" in line and "train.learning_rate" in line
    folder = tmp_path / "run"
    assert state(folder, 2) == state(folder, 4) and not (folder / "checkpoints" / "step-000005").exists()


def test_dry_run_writes_nothing(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", SETTINGS)
    done = commands.run(CAPTION, config, "--dry-run").ok()
    assert "longest row: " in done.stderr and " vision patches: forward and backward in " in done.stderr
    assert not (tmp_path / "run").exists()
