"""Checkpoints of several processes: read by any other number of them, whole or not there at all."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from tests.distributed.launchers import ended
from tests.distributed.saving import SHAPES, Trained, check, values
from tests.runs.commands import Commands
from tests.runs.processes import free_port, run_together

PROGRAM = "tests.distributed.saving"
NUMBERS = 3 * sum(math.prod(shape) for shape in SHAPES.values()) + len(SHAPES)
"""In a checkpoint: each parameter with two moments, and a step count for each."""


@pytest.mark.parametrize(
    ("asynchronous", "stages"),
    [
        ("async", [(1, 0), (2, 0), (4, 2), (3, 0), (1, 0)]),
        pytest.param("sync", [(3, 0), (4, 0), (2, 1), (4, 2), (2, 0)], marks=pytest.mark.slow),
    ],
    ids=["async", "sync"],
)
def test_any_number_of_processes_reads_what_any_other_wrote(
    commands: Commands, tmp_path: Path, asynchronous: str, stages: list[tuple[int, int]]
) -> None:
    """`stages`: processes, and over how many of them the model is sharded; 0: all."""
    root = tmp_path / "checkpoints"
    for step, (processes, shard) in enumerate(stages, 1):
        for result in run_together(commands, processes, PROGRAM, "reshard", root, step, shard, asynchronous):
            result.ok()
        folder = root / f"step-{step:06d}"
        names = {path.name for path in folder.iterdir()}
        writers = shard or processes
        tensors = {"trainable.safetensors", "optimizer.safetensors"}
        if writers > 1:
            ends = [f"-{number:05d}-of-{writers:05d}.safetensors" for number in range(1, writers + 1)]
            tensors = {f"{file}{end}" for file in ("trainable", "optimizer") for end in ends}
        assert names == tensors | {"state.json", "manifest.json"}
        assert set(json.loads((folder / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
        # Each number is written once.
        assert sum(t.numel() for name in tensors for t in load_file(folder / name).values()) == NUMBERS
        if step > 1:
            loaded = load_file(root / f"loaded-{step}.safetensors")
            expected = values(step - 1)
            assert loaded.keys() == expected.keys()
            assert [name for name, value in expected.items() if not loaded[name].equal(value)] == []
            read = [int((tmp_path / f"read-{step}-{rank}").read_text()) for rank in range(processes)]
            # Nobody reads more than its rows, and the step counts, which all hold.
            most = 3 * sum(math.ceil(shape[0] / writers) * math.prod(shape[1:]) for shape in SHAPES.values())
            assert max(read) <= most + len(SHAPES)
            assert sum(read) == processes // writers * (NUMBERS - len(SHAPES)) + processes * len(SHAPES)


def test_torch_reads_the_shards_too(commands: Commands, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for result in run_together(commands, 2, PROGRAM, "reshard", root, 1, 0, "async"):
        result.ok()
    found = {name: torch.empty_like(value) for name, value in values(1).items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(root / "step-000001")), no_dist=True)
    assert [name for name, value in values(1).items() if not found[name].equal(value)] == []


@pytest.mark.parametrize("asynchronous", ["sync", "async"])
@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_moment(commands: Commands, tmp_path: Path, asynchronous: str, stride: int) -> None:
    result = commands.run(PROGRAM, "kills", tmp_path, asynchronous, stride).ok()
    told = json.loads(result.stdout.splitlines()[-1])
    # Two files in blocks, state and manifest, all of it flushed, a rename, and the removal of the one before.
    assert told["kills"] * stride > 20 and 0 < told["first"] < told["kills"]


@pytest.mark.parametrize(
    ("rank", "number"),
    [(0, 1), (1, 2), *(pytest.param(rank, n, marks=pytest.mark.slow) for rank in (0, 1) for n in (3, 6, 10, 14, 99))],
)
def test_one_of_two_processes_killed_while_it_saves(commands: Commands, tmp_path: Path, rank: int, number: int) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    root = tmp_path / "checkpoints"
    started = [
        commands.start(PROGRAM, "victim", root, rank, number, "async", RANK=str(r), LOCAL_RANK=str(r), **address)
        for r in (0, 1)
    ]
    statuses = [ended(one, 40).status for one in started]
    if number == 99:  # it has less than that to do
        assert statuses == [0, 0]
    else:
        assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] > 0
    assert check(root, Trained()) == (2 if number == 99 else 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_is_the_error_of_all(commands: Commands, tmp_path: Path, rank: int) -> None:
    root = tmp_path / "checkpoints"
    for result in run_together(commands, 2, PROGRAM, "fails", root, rank):
        result.ok()
    errors = [(tmp_path / f"error-{r}").read_text() for r in (0, 1)]
    assert errors[0] == errors[1] and str(root / "step-000001") in errors[0] and "File too large" in errors[0]
    assert list(root.iterdir()) == []


def test_signals_while_a_save_is_in_flight(commands: Commands, tmp_path: Path) -> None:
    started = {
        (name, times): commands.start(PROGRAM, "signals", tmp_path / f"{name}{times}" / "checkpoints", name, times)
        for name, times in (("SIGINT", 1), ("SIGINT", 2), ("SIGTERM", 1))
    }
    results = {key: one.wait() for key, one in started.items()}
    once = results["SIGINT", 1]
    assert "KeyboardInterrupt" in once.stderr and "waiting for the checkpoint of step 1" in once.stderr
    assert check(tmp_path / "SIGINT1" / "checkpoints", Trained()) == 1
    assert results["SIGTERM", 1].status == -signal.SIGTERM
    for name in ("SIGINT2", "SIGTERM1"):
        assert [path.name for path in (tmp_path / name / "checkpoints").iterdir()] == [".partial-step-000001"]
