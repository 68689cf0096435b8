"""Several processes score options as one does, whatever share of the questions each of them has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands
from tests.runs.processes import run_together
from tests.runs.world import World

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
    found = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.json"
        arguments = (world.base, tmp_path / "questions.json", trained, output)
        for result in run_together(commands, processes, "tests.distributed.scoring", *arguments):
            result.ok()
        found.append(json.loads(output.read_text()))
    for name, asked in lists.items():
        assert found[0][name]["drawn"] == found[1][name]["drawn"], name
        one, two = (result[name]["answers"] for result in found)
        assert list(one) == list(two) == [part["id"][0] for part in asked], name
        for part in asked:
            (text, *scores), (other_text, *other) = one[part["id"][0]], two[part["id"][0]]
            assert text == other_text and len(scores) == len(part["options"]), name
            assert scores == pytest.approx(other, rel=1e-5), name
        assert len(set(found[1][name]["passes"])) == 2, f"{name}: one process should have more to score"
