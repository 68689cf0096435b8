"""Runs on several sources: losses and scores of each; and runs that end when a score gets no better."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import CAPTION, Commands, column, metrics
from tests.runs.processes import run_together
from tests.runs.world import TEXTS, World, record, video_record

SOURCES = [{"format": "messages", "path": "clips.jsonl"}, {"format": "messages", "path": "texts.jsonl"}]


@pytest.fixture(scope="module")
def apart(world: World) -> World:
    """Clips and texts in files of their own; a clip is in both."""
    clips = [video_record(colour) for colour in ("red", "green", "blue")]
    texts = [record(question, answer) for question, answer in TEXTS.items()] + [video_record("red") | {"id": "again"}]
    for name, lines in {"clips": clips, "texts": texts}.items():
        (world.root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return world


def of(source: str, **train: Any) -> dict[str, Any]:
    """Settings with one source, or both."""
    sources = [one for one in SOURCES if source in (one["path"], "both")]
    return {"data": {"sources": sources, "pack_tokens": 2048}, "train": {"max_steps": 3, "packs_per_step": 1, **train}}


def test_losses_of_each_source(apart: World, commands: Commands, tmp_path: Path) -> None:
    """At the first step a source's loss is that of a run on it alone; their mean by tokens is the whole."""
    held_out = {"eval": {"every_steps": 3, "max_new_tokens": 4, "sources": SOURCES}}
    both = metrics(commands.train(apart.config(tmp_path / "both.toml", of("both"), held_out)))
    first = next(line for line in both if "loss" in line)
    alone = {
        name: metrics(commands.train(apart.config(tmp_path / f"{name}.toml", of(f"{name}.jsonl"))))[0]
        for name in ("clips", "texts")
    }
    for name, line in alone.items():
        assert first[f"loss/source/{name}"] == pytest.approx(line["loss"], rel=1e-5)
        assert "loss/source/clips" not in line
    tokens = {name: line["num_targets"] for name, line in alone.items()}
    mean = sum(first[f"loss/source/{name}"] * count for name, count in tokens.items()) / sum(tokens.values())
    assert first["loss"] == pytest.approx(mean, rel=1e-6) and first["num_targets"] == sum(tokens.values())
    before = next(line for line in both if "eval_loss" in line)
    for name in tokens:
        assert before[f"eval_loss/source/{name}"] == pytest.approx(first[f"loss/source/{name}"], rel=1e-5)
    assert "eval_cider_d/source/clips" in before
    page = (tmp_path / "both" / "report.html").read_text()
    assert "loss/source" in page


def test_one_process_and_two(apart: World, commands: Commands, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        config = apart.config(
            tmp_path / f"{processes}.toml", of("both", packs_per_step=2), {"data": {"pack_tokens": 256}}
        )
        for one in run_together(commands, processes, CAPTION, config):
            one.ok()
        found.append(config.with_suffix(""))
    for name in ("loss/source/clips", "loss/source/texts"):
        one, two = (column(folder, name) for folder in found)
        assert two == pytest.approx(one, rel=1e-5, nan_ok=True)


def test_patience(apart: World, commands: Commands, tmp_path: Path) -> None:
    """Nothing changes at such a learning rate: the first evaluation stays the best, and two later ones end the run. The
    same command again does no further step."""
    limits = {"every_steps": 2, "best_metric": "loss", "patience": 2, "max_new_tokens": 4, "sources": SOURCES}
    settings = of("clips.jsonl", max_steps=20, learning_rate=1e-30, schedule="constant", warmup_steps=0)
    config = apart.config(tmp_path / "run.toml", settings, {"eval": limits})
    result = commands.run(CAPTION, config).ok()
    folder = tmp_path / "run"
    assert json.loads((folder / "best.json").read_text())["step"] == 2
    steps = [line["step"] for line in metrics(folder) if "loss" in line]
    assert steps[-1] == 6
    assert f"loss has not been better for 2 evaluations: stopped after step {steps[-1]} of 20" in result.stderr
    assert (folder / "adapter").is_dir() and (folder / "best").is_dir()
    again = commands.run(CAPTION, config).ok()
    assert [line["step"] for line in metrics(folder) if "loss" in line] == steps
    assert "stopped after step" in again.stderr
    whole = commands.run(
        CAPTION, apart.config(tmp_path / "bad.toml", settings, {"eval": {**limits, "best_metric": ""}})
    )
    assert re.search(r"eval\S* ?.*patience = 2 needs best_metric", whole.error)


def test_many_epochs(apart: World, commands: Commands, tmp_path: Path) -> None:
    """How often a run sees its samples stands in its first line; very often is told. A warm-up that is too long is
    refused with one that fits."""
    config = apart.config(tmp_path / "run.toml", of("clips.jsonl"), {"train": {"packs_per_step": 16}})
    few = commands.run(CAPTION, config, "--dry-run", "train.max_steps=2").ok()
    epochs = commands.run(CAPTION, config, "--dry-run", "train.max_steps=", "train.epochs=2").ok()
    assert "train.epochs = 2 is only 1 step(s), which teach little" in epochs.stderr
    assert "is only" not in few.stderr
    assert ", steps 2, epochs 32" in few.stderr and "by heart" not in few.stderr
    many = commands.run(CAPTION, config, "--dry-run", "train.max_steps=500").ok()
    assert "500 steps of 16 rows are 8000 epochs of 3 samples, which will be learnt by heart" in many.stderr
    long = commands.run(CAPTION, config, "train.max_steps=20", "train.warmup_steps=50")
    assert long.error.endswith("warmup_steps = 50 is above max_steps = 20; take fewer, such as train.warmup_steps=2")
