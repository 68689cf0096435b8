"""Processes with different media in the same step, or with nothing at all: none waits for ever.

Packs are of one sample, so that one process has a text where another has a picture or a video, and the last step of a
run has fewer packs than places. `--count 500` is 500 steps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands, metrics
from tests.runs.processes import run_together
from tests.runs.world import FULL_TUNING, MIXED, VISION_LORA, World, make_world

SCRIPT = str(Path(__file__).with_name("modalities.py"))
RECORDS = 9
"""In mixed.jsonl: 3 texts, 3 with pictures, 3 with a video."""
STEP_S = 2.0
"""More than a step takes on a machine that is busy otherwise."""
PARTS: dict[str, dict[str, Any]] = {"frozen": {}, "trained": VISION_LORA, "in full": FULL_TUNING}


def kinds_by_step(file: Path, processes: int) -> dict[int, tuple[str, ...]]:
    """What the processes had in each step, a text for each process: its packs one behind the other."""
    found: dict[int, list[str]] = defaultdict(lambda: [""] * processes)
    for rank in range(processes):
        for line in file.with_name(f"{file.name}.{rank}").read_text().splitlines():
            step, what = line.split()
            found[int(step)][rank] = f"{found[int(step)][rank]} {what}".strip()
    return {step: tuple(what) for step, what in found.items()}


def run_mixed(
    commands: Commands, world: World, folder: Path, processes: int, packs_per_step: int, steps: int, parts: str
) -> Counter[tuple[str, ...]]:
    """Train about `steps` steps on mixed media; what the processes had side by side, in an order of its own."""
    # An odd number of epochs of 9 packs, so that the last step isn't filled.
    epochs = max(1, steps * packs_per_step // RECORDS) | 1
    expected = -(-epochs * RECORDS // packs_per_step)
    settings: dict[str, Any] = {
        "train": {"max_steps": None, "epochs": epochs, "packs_per_step": packs_per_step, "learning_rate": 1e-4},
        "eval": {
            "sources": [{"format": "messages", "path": "mixed.jsonl"}],
            "every_steps": expected,
            "max_new_tokens": 2,
            "batch_size": 2,
        },
    }
    config = world.config(folder / "run.toml", MIXED, settings, PARTS[parts])
    ended = run_together(commands, processes, SCRIPT, config, MODALITIES=str(folder / "kinds"))
    assert [one.status for one in ended] == [0] * processes, [one.stderr[-2000:] for one in ended]
    lines = [line for line in metrics(folder / "run") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, expected + 1))
    assert all(line["loss"] is not None and line["samples"] > 0 for line in lines)
    assert sum(line["samples"] for line in lines) == epochs * RECORDS
    found = kinds_by_step(folder / "kinds", processes)
    assert len(found) == expected and "empty" in " ".join(found[expected])
    return Counter(tuple(sorted(what)) for what in found.values())


def told(combinations: Counter[tuple[str, ...]], what: str) -> None:
    """The figures of the row."""
    unlike = sum(n for kinds, n in combinations.items() if len(set(kinds)) > 1)
    print(f"{what}: {combinations.total()} steps, 0 hangs, {unlike} with different media in the processes")
    for kinds, n in combinations.most_common(8):
        print(f"  {n} x {' | '.join(kinds)}")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, count: Callable[[int], int]) -> Callable[[int], int]:
    """As `count`, with as much time as so many steps take."""
    monkeypatch.setattr("tests.runs.processes.PATIENCE_S", 100 + STEP_S * count(0))
    return count


@pytest.mark.parametrize("parts", ["frozen", "trained", pytest.param("in full", marks=pytest.mark.slow)])
def test_two_processes(
    world: World, commands: Commands, tmp_path: Path, patient: Callable[[int], int], parts: str
) -> None:
    combinations = run_mixed(commands, world, tmp_path, 2, 2, patient(5), parts)
    told(combinations, f"2 processes, encoder {parts}")
    unlike = {kinds for kinds in combinations if len(set(kinds) - {"empty"}) > 1}
    assert unlike and any("text" in kinds for kinds in unlike)
    if combinations.total() > 100:
        assert unlike >= {("image", "text"), ("text", "video"), ("image", "video")}


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["frozen", "trained"])
def test_three_processes(
    world: World, commands: Commands, tmp_path: Path, patient: Callable[[int], int], parts: str
) -> None:
    """Two packs a process and step; 9 packs leave the last step half empty."""
    combinations = run_mixed(commands, world, tmp_path, 3, 6, patient(2), parts)
    told(combinations, f"3 processes, encoder {parts}")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next_video", "qwen3_vl"])
def test_other_families(commands: Commands, tmp_path: Path, patient: Callable[[int], int], family: str) -> None:
    world = make_world(tmp_path / "world", family)
    combinations = run_mixed(commands, world, tmp_path, 2, 2, patient(5), "trained")
    told(combinations, f"{family}, 2 processes, encoder trained")
