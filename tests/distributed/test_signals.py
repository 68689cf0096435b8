"""A signal to any of several processes ends all of them after the same step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launchers import Launcher, rank_processes, wait_for_step
from tests.distributed.test_failures import start
from tests.runs.commands import CAPTION, Commands, metrics
from tests.runs.processes import run_together
from tests.runs.same import without_times
from tests.runs.world import World

STEPS = 30
SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "data": {"max_samples_per_pack": 1},
    "train": {"max_steps": STEPS, "packs_per_step": 2},
    "parallel": {"shard": 2},
}


def newest(folder: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


@pytest.fixture(scope="module")
def undisturbed(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes to its end."""
    config = world.config(tmp_path_factory.mktemp("undisturbed") / "run.toml", SETTINGS)
    for one in run_together(commands, 2, CAPTION, config):
        one.ok()
    return config.with_suffix("")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_is_signalled(
    world: World, commands: Commands, undisturbed: Path, tmp_path: Path, victim: int
) -> None:
    config, folder = world.config(tmp_path / "run.toml", SETTINGS), tmp_path / "run"
    started = start(commands, config, [0, 1], 2)
    wait_for_step(folder, 3, lambda: all(one.is_running for one in started))
    os.kill(started[victim].pid, signal.SIGTERM)
    ended = [one.wait() for one in started]
    assert [one.status for one in ended] == [128 + signal.SIGTERM] * 2, ended
    done = metrics(folder)[-1]["step"]
    assert 3 <= done < STEPS and newest(folder) == done
    assert f"SIGTERM: stopped after step {done}; the same command goes on there" in ended[0].stderr.splitlines()
    assert "Traceback" not in ended[0].stderr + ended[1].stderr and "stopped: " not in ended[1].stderr
    for one in run_together(commands, 2, CAPTION, config):
        one.ok()
    assert without_times(folder) == without_times(undisturbed)
    final = f"checkpoints/step-{STEPS:06d}"
    for file in (undisturbed / final).glob("*.safetensors"):
        assert (folder / final / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_torchrun_is_signalled(world: World, commands: Commands, tmp_path: Path, name: str) -> None:
    """It passes the signal on to the processes."""
    config, folder = world.config(tmp_path / "run.toml", SETTINGS, {"train": {"max_steps": 100_000}}), tmp_path / "run"
    with Launcher(commands.torchrun_words(2, config), commands.environment, tmp_path / "log") as launcher:
        wait_for_step(folder, 3, launcher.is_running, seconds=240)
        os.kill(launcher.pid, getattr(signal, name))
        assert launcher.wait(60) != 0
        text = launcher.output()
        assert not rank_processes(launcher.pid)
    done = metrics(folder)[-1]["step"]
    assert newest(folder) == done and f"{name}: stopped after step {done}; the same command goes on there" in text
    assert (folder / "quarantine.jsonl").read_text() == ""
