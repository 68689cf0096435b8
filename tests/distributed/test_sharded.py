"""Sharded models in several processes: what they load, send and score is what one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from workload import SHAPES, write_checkpoint

from tests.helpers.tiny import Tiny
from tests.runs.commands import Commands
from tests.runs.processes import run_together
from tests.runs.world import World
from vft.models.pretrained import INDEX_FILE


def sharded(commands: Commands, processes: int, work: str, *arguments: Any) -> Any:
    """What `tests.distributed.sharded` wrote to its last argument."""
    for result in run_together(commands, processes, "tests.distributed.sharded", work, *arguments):
        result.ok()
    return json.loads(arguments[-1].read_text())


# -------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 72B's 80 layers, narrow: 150 MB in several files, under the released names."""
    folder = tmp_path_factory.mktemp("thin") / "base"
    write_checkpoint(folder, SHAPES["72b-thin"], torch.float32, file_bytes=24 << 20)
    names = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    assert {"lm_head.weight", "model.layers.79.mlp.down_proj.weight", "visual.merger.mlp.2.bias"} <= set(names)
    assert len(set(names.values())) > 5
    return folder


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
    alone = sharded(commands, 1, "loading", thin, trained, tmp_path / "alone.json")
    found = sharded(commands, processes, "loading", thin, trained, tmp_path / "found.json")
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
    alone, found = (
        sharded(commands, count, "loading", base, "components", tmp_path / f"{count}.json") for count in (1, 3)
    )
    assert_right(found, alone)


# -------------------------------------------------------------------------------------------------------- traffic


GATHERED, REDUCED = "allgather_base torch.bfloat16", "reduce_scatter_base torch.float32"
GATHERS: list[tuple[dict[str, Any], int]] = [
    ({}, 2),
    ({"offload": "frozen"}, 2),
    ({"activation_checkpointing": "full"}, 2),
    ({"reshard_after_forward": False}, 1),
]
"""Settings, and how often a layer is gathered for one row: once forward and once backward, recomputed or not."""


def test_traffic_of_two_processes(commands: Commands, tiny_bf16: Tiny, tmp_path: Path) -> None:
    """Only adapters' gradients are reduced, in float32; weights are gathered in bf16, as often as they must be."""
    settings = [*(parallel for parallel, _ in GATHERS), {"shard": 1}]
    output = tmp_path / "traffic.json"
    *gathering, replicated = sharded(commands, 2, "traffic", tiny_bf16.path, json.dumps(settings), output)
    for found in (*gathering, replicated):
        assert found["frozen with gradient"] == []
        assert 20 * found["trained"] > found["layers"] > 5 * found["trained"] > 0
    for (parallel, gathers), found in zip(GATHERS, gathering, strict=True):
        gathered = 2 * (gathers * found["layers"] + found["ends"])  # what is outside the layers is gathered once
        assert found["bytes"] == {GATHERED: gathered, REDUCED: 4 * found["trained"]}, parallel
    assert replicated["bytes"] == {"allreduce torch.float32": 4 * replicated["trained"]}


# -------------------------------------------------------------------------------------------------- scoring options


LABELS = [f"{verb} {what}" for verb in ("riding", "painting", "carrying", "left", "left and") for what in "abcde"]


def question(number: int, options: list[str], *media: Path) -> dict[str, list[str]]:
    return {"id": [f"q{number}"], "options": options, "media": [str(path) for path in media]}


def shares(world: World) -> dict[str, list[Any]]:
    """Questions by how they fall to two processes, turn and turn about."""
    red, blue = world.root / "red.mp4", world.root / "blue.mp4"
    few: list[str] = ["left", "left and up"]
    return {
        # Many options in several chunks here, two options there, then a question more than the other has.
        "uneven": [question(0, LABELS, red), question(1, few, blue), question(2, few, world.root / "red.png")],
        "one has none": [question(0, LABELS, red)],
        # Options, or media, with one process alone.
        "options on one side": [question(0, LABELS, red), question(1, [], blue)],
        "media on one side": [question(0, few), question(1, LABELS, blue)],
    }


@pytest.mark.parametrize("trained", ["adapters", "components"])
def test_two_processes_score_as_one(commands: Commands, world: World, tmp_path: Path, trained: str) -> None:
    """Sharded weights, so that a pass that one process skipped would hold up the other for ever."""
    lists = shares(world)
    (tmp_path / "questions.json").write_text(json.dumps(lists))
    arguments = (world.base, tmp_path / "questions.json", trained)
    found = [sharded(commands, count, "scoring", *arguments, tmp_path / f"{count}.json") for count in (1, 2)]
    for name, asked in lists.items():
        assert found[0][name]["drawn"] == found[1][name]["drawn"], name
        one, two = (result[name]["answers"] for result in found)
        assert list(one) == list(two) == [part["id"][0] for part in asked], name
        for part in asked:
            (text, *scores), (other_text, *other) = one[part["id"][0]], two[part["id"][0]]
            assert text == other_text and len(scores) == len(part["options"]), name
            assert scores == pytest.approx(other, rel=1e-5), name
        assert len(set(found[1][name]["passes"])) == 2, f"{name}: one process should have more to score"
