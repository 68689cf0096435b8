"""Tools that answer in several processes say and write what one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs.commands import Commands
from tests.runs.processes import run_together
from tests.runs.world import ANSWERS, MIXED, PROMPT, World, damage, write_clip


@pytest.fixture(scope="module")
def adapter(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that changes what the base says."""
    settings = {"train": {"max_steps": 3, "learning_rate": 1e-2}}
    return commands.train(world.config(tmp_path_factory.mktemp("adapter") / "run.toml", settings)) / "adapter"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_predict(world: World, commands: Commands, adapter: Path, tmp_path: Path, temperature: float) -> None:
    """Five files, of which one can't be used: the last turn has one file for two processes."""
    write_clip(tmp_path / "damaged.mp4", "red")
    damage(tmp_path / "damaged.mp4")
    clips = [world.root / f"{colour}.mp4" for colour in ANSWERS]
    files = [clips[0], tmp_path / "damaged.mp4", *clips[1:]]
    arguments = ("--model", world.base, "--adapter", adapter, "--prompt", PROMPT, "--max-new-tokens", 12)
    arguments = (*arguments, "--temperature", temperature, "--json", *files)
    alone = commands.run("tools/predict.py", *arguments)
    first, second = run_together(commands, 2, "tools/predict.py", *arguments)
    assert alone.status == first.status == second.status == 1
    assert first.stdout == alone.stdout and second.stdout == ""
    assert len({json.loads(line)["prediction"] for line in alone.stdout.splitlines()}) > 1
    told = [line for line in alone.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and told == [line for line in first.stderr.splitlines() if line.startswith("error: ")]
    assert "error: " not in second.stderr


def test_predict_to_a_file(world: World, commands: Commands, adapter: Path, tmp_path: Path) -> None:
    """The lines that one process writes, in turns of four questions; then only what is new is asked."""
    write_clip(tmp_path / "damaged.mp4", "red")
    damage(tmp_path / "damaged.mp4")
    clips = [world.root / f"{colour}.{kind}" for colour in ANSWERS for kind in ("mp4", "png")]
    arguments = ("--model", world.base, "--adapter", adapter, "--prompt", PROMPT, "--max-new-tokens", 6)
    files = (tmp_path / "damaged.mp4", *clips[:5])
    # Beside it the frames are decoded by another process, while answers are given.
    commands.run("tools/predict.py", *arguments, "--workers", 1, "--output", tmp_path / "one.jsonl", *files)
    arguments = (*arguments, "--batch-size", 2, "--output", tmp_path / "two.jsonl")
    first, second = run_together(commands, 2, "tools/predict.py", *arguments, *files)
    assert first.status == second.status == 1 and first.stdout == second.stdout == ""
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert "1 of 6 questions have no answer (decode_error 1)" in first.stderr
    run_together(commands, 2, "tools/predict.py", *arguments, *clips)[0].ok()
    lines = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(clip) for clip in clips]  # the error is gone: it was not asked again


@pytest.mark.parametrize("shard", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_evaluate(world: World, commands: Commands, adapter: Path, tmp_path: Path, shard: int) -> None:
    """The same files, and scores to within rounding: five questions and four, some with pictures, two at a time."""
    settings = {"eval": {"max_new_tokens": 6, "batch_size": 2}, "parallel": {"shard": shard}}
    config = world.config(tmp_path / "run.toml", MIXED, settings)
    scores = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        arguments = (config, "--adapter", adapter, "--compare-base", "--show", 1, "--output", output)
        results = run_together(commands, processes, "tools/evaluate.py", *arguments)
        assert "cider_d" in results[0].ok().stdout and all(result.ok().stdout == "" for result in results[1:])
        scores[processes] = json.loads((output / "scores.json").read_text())
    for name in ("base.jsonl", "adapter.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert scores[1].keys() == scores[2].keys() == {"task", "base", "adapter", "difference"}
    for model in ("base", "adapter", "difference"):
        assert scores[1][model].keys() == scores[2][model].keys()
        for metric, one in scores[1][model].items():
            other = scores[2][model][metric]
            assert other.pop("tokenization", None) == one.pop("tokenization", None)
            assert other == pytest.approx(one, rel=1e-5, abs=1e-5), metric
    assert scores[1]["base"]["loss"]["value"] != scores[1]["adapter"]["loss"]["value"]
    for metric, one in scores[1]["difference"].items():
        wanted = scores[1]["adapter"][metric]["value"] - scores[1]["base"][metric]["value"]
        assert one["value"] == pytest.approx(wanted, abs=1e-9) and one["low"] <= one["value"] <= one["high"], metric
    assert {"cider_d", "bleu4", "rouge_l", "loss"} == scores[1]["difference"].keys()


def test_evaluate_with_offloaded_weights(world: World, commands: Commands, adapter: Path, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"eval": {"max_new_tokens": 6}})
    for name, override in (("plain", "parallel.offload=none"), ("offloaded", "parallel.offload=frozen")):
        arguments = (config, override, "--adapter", adapter, "--output", tmp_path / name)
        commands.run("tools/evaluate.py", *arguments).ok()
    assert (tmp_path / "plain" / "adapter.jsonl").read_bytes() == (
        tmp_path / "offloaded" / "adapter.jsonl"
    ).read_bytes()
