"""Adapters' gradients are all that is reduced, in float32; weights are gathered in bf16, as often as they must be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.tiny import Tiny
from tests.runs.commands import Commands
from tests.runs.processes import run_together

GATHERED, REDUCED = "allgather_base torch.bfloat16", "reduce_scatter_base torch.float32"


GATHERS: list[tuple[dict[str, Any], int]] = [
    ({}, 2),
    ({"offload": "frozen"}, 2),
    ({"activation_checkpointing": "full"}, 2),
    ({"reshard_after_forward": False}, 1),
]
"""Settings, and how often a layer is gathered for one row: once forward and once backward, recomputed or not."""


def test_two_processes(commands: Commands, tiny_bf16: Tiny, tmp_path: Path) -> None:
    settings = [*(parallel for parallel, _ in GATHERS), {"shard": 1}]
    output = tmp_path / "traffic.json"
    for result in run_together(
        commands, 2, "tests.distributed.sharded_traffic", tiny_bf16.path, json.dumps(settings), output
    ):
        result.ok()
    *sharded, replicated = json.loads(output.read_text())
    for found in (*sharded, replicated):
        assert found["frozen with gradient"] == []
        assert 20 * found["trained"] > found["layers"] > 5 * found["trained"] > 0
    for (parallel, gathers), found in zip(GATHERS, sharded, strict=True):
        gathered = 2 * (gathers * found["layers"] + found["ends"])  # what is outside the layers is gathered once
        assert found["bytes"] == {GATHERED: gathered, REDUCED: 4 * found["trained"]}, parallel
    assert replicated["bytes"] == {"allreduce torch.float32": 4 * replicated["trained"]}
