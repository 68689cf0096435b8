"""Fixtures of the folders that run whole commands."""

from __future__ import annotations

from collections.abc import Iterator
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
