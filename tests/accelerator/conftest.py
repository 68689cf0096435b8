"""Fixtures: whole commands, and runs on the pretend device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs.commands import Commands, Result
from tests.runs.fixtures import commands, world

__all__ = ["commands", "world"]
Pretend = Callable[..., "PretendRun"]


@dataclass(frozen=True)
class PretendRun:
    """A command that ran on the pretend device."""

    result: Result
    notes: Path
    """What `on_pretend.py --notes` wrote."""

    def waits(self, name: str = "waits") -> dict[str, int]:
        """How often the host waited, by place and reason; `step-NNNNNN` for one training step."""
        waits: dict[str, int] = json.loads((self.notes / f"{name}.json").read_text())
        return waits


@pytest.fixture
def pretend(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Pretend:
    """Runs a module of vft on the pretend device, with options of `on_pretend.py` before it."""

    def run(*words: object) -> PretendRun:
        notes = tmp_path_factory.mktemp("notes")
        return PretendRun(commands.run("tests.accelerator.on_pretend", "--notes", notes, *words), notes)

    return run
