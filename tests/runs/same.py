"""Whether two runs came to the same, bit for bit but for times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.runs.commands import TIMES, metrics


def without_times(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl as far as it is determined by the configuration."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)]


def final_files(folder: Path, steps: int) -> dict[str, bytes]:
    """What the last of so many steps left: weights, optimizer, cursor, answers and export."""
    last = folder / "checkpoints" / f"step-{steps:06d}"
    left = [*folder.glob("best.json")]
    for kind in ("adapter", "best", "model", "predictions"):
        left += (folder / kind).glob("*")
    files = [path for path in [*last.iterdir(), *left] if path.name != "README.md"]  # says how long it took
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same(folder: Path, expected: Path, steps: int) -> None:
    """The same losses, samples, weights and state after so many steps, and nothing half-written."""
    assert without_times(folder) == without_times(expected)
    assert final_files(folder, steps) == final_files(expected, steps)
    assert not [path for path in folder.rglob(".partial-*")]
