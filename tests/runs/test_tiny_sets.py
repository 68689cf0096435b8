"""Sets of one or two records, fewer than the rows of a step: they train and are scored, or end with a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands, metrics
from tests.runs.world import World

ONE = {"id": "a", "video": "red.mp4", "question": "What?", "answer": "A bar."}
SCORED = {"eval": {"every_steps": 2, "max_new_tokens": 2, "best_metric": "loss"}, "train": {"packs_per_step": 8}}


def run(world: World, commands: Commands, folder: Path, task: str, *sources: dict[str, Any]) -> Any:
    """A run of two steps; the sources' records lie in the world's data for the time being."""
    named = []
    for i, source in enumerate(sources):
        path = world.root / f"{folder.name}-{i}.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in source["records"]))
        named.append({"format": "messages", "path": path.name, **source.get("keys", {})})
    config = world.config(folder / "run.toml", {"data": {"sources": named}, **SCORED})
    return commands.run(f"vft.recipes.{task}", config, "train.max_steps=2"), config.with_suffix("")


@pytest.mark.parametrize(
    ("task", "sources"),
    [
        ("qa", [{"records": [ONE]}]),
        ("caption", [{"records": [ONE, {**ONE, "question": "Who?"}]}]),
        ("classify", [{"records": [{"video": "red.mp4", "label": "red"}]}]),
        ("qa", [{"records": [ONE], "keys": {"share": 0.1}}, {"records": [ONE, ONE], "keys": {"share": 0.9}}]),
        ("qa", [{"records": [ONE], "keys": {"weight": 0.5}}]),
    ],
)
def test_a_tiny_set_trains_and_is_scored(
    world: World, commands: Commands, tmp_path: Path, task: str, sources: list[dict[str, Any]]
) -> None:
    result, folder = run(world, commands, tmp_path, task, *sources)
    result.ok()
    samples = [line["samples"] for line in metrics(folder) if "samples" in line]
    assert "Traceback" not in result.stderr and len(samples) == 2 and min(samples) >= 8  # each row has some
    assert ("weight" in sources[0].get("keys", {})) == ("is read as before" in result.stdout + result.stderr)
    report = (folder / "report.html").read_text()
    for source in sources:
        assert all(f"{name} {value:g}" in report for name, value in source.get("keys", {}).items())


def test_no_record_of_a_tiny_set_is_a_line(world: World, commands: Commands, tmp_path: Path) -> None:
    path = world.root / f"{tmp_path.name}.jsonl"
    path.write_text(json.dumps(ONE))
    source = {"format": "messages", "path": path.name, "repeats": 0.2}
    config = world.config(tmp_path / "run.toml", {"data": {"sources": [source]}})
    for overrides, words in (
        (("train.max_steps=", "train.epochs=1"), "train.epochs = 1: by repeats no record comes"),
        (("eval.split=0.0001", "eval.every_steps=1"), "eval.split = 0.0001: none of 1 samples of"),
    ):
        result = commands.run("vft.recipes.qa", config, *overrides)
        assert result.status == 2 and words in result.error and not (tmp_path / "run").exists()
