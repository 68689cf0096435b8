"""Fixtures of the folders that run whole commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.runs.commands import Commands, commands_in

if TYPE_CHECKING:
    from tests.runs.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Checkpoints, clips and records; tests leave them as they are."""
    from tests.runs.world import make_world  # imports transformers, which takes seconds

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs commands."""
    with commands_in(tmp_path_factory.mktemp("commands")) as running:
        yield running


@pytest.fixture(scope="session")
def learned(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that knows the answers to the clips by heart."""
    settings = {
        "lora": {"rank": 8, "alpha": 16},
        "train": {"max_steps": 60, "learning_rate": 1e-2, "schedule": "linear"},
    }
    return commands.train(world.config(tmp_path_factory.mktemp("learned") / "run.toml", settings))
