"""Adapters' gradients are all that is reduced, in float32; weights are gathered in bf16, as often as they must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import Tiny
from tests.runs.commands import Commands
from tests.runs.processes import run_together

GATHERED, REDUCED = "allgather_base torch.bfloat16", "reduce_scatter_base torch.float32"


def traffic(commands: Commands, tiny: Tiny, output: Path, **settings: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """Bytes of one row in two processes, and sizes of the model."""
    program = "tests.distributed.sharded_traffic"
    for result in run_together(commands, 2, program, tiny.path, json.dumps(settings), output):
        result.ok()
    found = json.loads(output.read_text())
    assert found["frozen with gradient"] == []
    assert 20 * found["trained"] > found["layers"] > 5 * found["trained"] > 0
    return found["bytes"], found


@pytest.mark.parametrize(
    ("settings", "gathers"),
    [
        ({}, 2),
        ({"offload": "frozen"}, 2),
        ({"activation_checkpointing": "full"}, 2),
        ({"reshard_after_forward": False}, 1),
    ],
)
def test_two_shards(
    commands: Commands, tiny_bf16: Tiny, tmp_path: Path, settings: dict[str, Any], gathers: int
) -> None:
    """Layers once forwards and once backwards, recomputed or not; what is beside them once."""
    found, size = traffic(commands, tiny_bf16, tmp_path / "found.json", **settings)
    assert found == {GATHERED: 2 * (gathers * size["layers"] + size["ends"]), REDUCED: 4 * size["trained"]}


def test_two_replicas(commands: Commands, tiny_bf16: Tiny, tmp_path: Path) -> None:
    found, size = traffic(commands, tiny_bf16, tmp_path / "found.json", shard=1)
    assert found["allreduce torch.float32"] == 4 * size["trained"]
    assert sum(found.values()) == found["allreduce torch.float32"]  # and nothing else
