"""A run whose disk is full says so in one line, and leaves nothing that looks like a checkpoint."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import CAPTION, Commands, metrics
from tests.runs.world import World

STEPS = 12
OFTEN: dict[str, Any] = {"train": {"max_steps": STEPS}, "checkpoint": {"every_steps": 3}}
LIMIT = ("prlimit", "--fsize=30000")
"""No file may grow beyond so many bytes; adapters alone are larger. Others that a run writes are not."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 200 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk can't be mounted here: it takes root, and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_a_checkpoint(world: World, commands: Commands, tmp_path: Path, small_disk: Path) -> None:
    config = world.config(tmp_path / "run.toml", OFTEN, {"output_dir": str(small_disk / "run"), "lora": {"rank": 16}})
    error = commands.run(CAPTION, config).error
    root = small_disk / "run" / "checkpoints"
    numbers = re.fullmatch(
        rf"error: {root}: a checkpoint takes ([\d.]+) MB, ([\d.]+) MB are free on the disk; .*", error
    )
    assert numbers is not None and float(numbers[1]) > 0.2 >= float(numbers[2]), error
    assert not root.exists() and not (small_disk / "run" / "metrics.jsonl").exists()


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="no prlimit (util-linux) to limit the size of files")
@pytest.mark.parametrize("asynchronous", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_during_a_save(
    world: World, commands: Commands, tmp_path: Path, asynchronous: str
) -> None:
    config = world.config(tmp_path / "run.toml", OFTEN)
    result = commands.shell(*LIMIT, "python", "-m", CAPTION, config, f"checkpoint.asynchronous={asynchronous}")
    folder = tmp_path / "run"
    assert str(folder / "checkpoints" / "step-000003") in result.error and "File too large" in result.error
    assert list((folder / "checkpoints").iterdir()) == []
    assert 3 <= len(metrics(folder)) < STEPS and not (folder / "adapter").exists()
    commands.train(config)  # now there is room
    assert len(metrics(folder)) == STEPS


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="no prlimit (util-linux) to limit the size of files")
def test_two_processes_end_at_the_same_step_with_one_error(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", OFTEN)
    result = commands.shell(*LIMIT, *commands.torchrun_words(2, config))
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.status != 0 and len(errors) == 1 and "File too large" in errors[0], result.stderr[-4000:]
    assert result.stderr.count("Traceback") == 1, result.stderr[-4000:]  # the launcher's own: neither process has one
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
