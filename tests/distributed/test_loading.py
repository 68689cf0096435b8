"""Several processes together take little more memory than the model when they load it, and each gets its part right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from workload import SHAPES, write_checkpoint

from tests.runs.commands import Commands
from tests.runs.processes import run_together
from vft.models.pretrained import INDEX_FILE


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 72B's 80 layers, narrow: 150 MB in several files, under the released names."""
    folder = tmp_path_factory.mktemp("thin") / "base"
    write_checkpoint(folder, SHAPES["72b-thin"], torch.float32, file_bytes=24 << 20)
    names = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    assert {"lm_head.weight", "model.layers.79.mlp.down_proj.weight", "visual.merger.mlp.2.bias"} <= set(names)
    assert len(set(names.values())) > 5
    return folder


def load(commands: Commands, processes: int, base: Path, trained: str, output: Path) -> dict[str, Any]:
    for result in run_together(commands, processes, "tests.distributed.sharded_loading", base, trained, output):
        result.ok()
    return json.loads(output.read_text())


def assert_right(found: dict[str, Any], alone: dict[str, Any]) -> None:
    """Every tensor that of the file, and the same loss."""
    assert found["wrong"] == found["buffers"] == []
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.parametrize("trained", ["adapters", pytest.param("components", marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_memory_is_that_of_the_model(
    commands: Commands, thin: Path, tmp_path: Path, processes: int, trained: str
) -> None:
    """Summed over a host's processes. An encoder that isn't trained is whole in each and counted as often."""
    alone = load(commands, 1, thin, trained, tmp_path / "alone.json")
    found = load(commands, processes, thin, trained, tmp_path / "found.json")
    assert_right(found, alone)
    copies = (processes - 1) * found["encoder"] if trained == "adapters" else 0
    assert sum(found["held"]) == pytest.approx(found["model"] + copies, rel=0.01)
    ratio = sum(found["own"]) / found["model"]
    print(f"{processes} processes, {trained}: {ratio:.3f} of {found['model'] / 1e6:.0f} MB")  # pytest -rP shows it
    assert sum(found["held"]) / found["model"] < ratio + 0.05  # it was looked at
    assert ratio <= 1.2
    assert max(found["own"]) <= 1.2 * max(found["held"])


@pytest.mark.parametrize("kind", ["tiny", "tiny_untied", pytest.param("tiny_bf16", marks=pytest.mark.slow)])
def test_every_tensor_is_right(commands: Commands, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    """A tied head, one of its own, and rows that three processes can't share evenly."""
    base = request.getfixturevalue(kind).path
    alone = load(commands, 1, base, "components", tmp_path / "alone.json")
    assert_right(load(commands, 3, base, "components", tmp_path / "found.json"), alone)
