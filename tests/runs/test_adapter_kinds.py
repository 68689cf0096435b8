"""DoRA and PiSSA from training to a merged model, and through an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands, column
from tests.runs.world import ANSWERS, PROMPT, World

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"dora": True, "loraplus_ratio": 2.0, "alphas": {"language_model.o_proj": 8.0}},
    "pissa": {"init": "pissa", "ranks": {"language_model.q_proj": 4}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_from_training_to_a_merged_model(world: World, commands: Commands, tmp_path: Path, kind: str) -> None:
    """The clips are learnt by heart, to the same bits where the run was stopped; the merged model knows them too."""
    settings = {
        "lora": {"rank": 8, "alpha": 16, **KINDS[kind]},
        "train": {"max_steps": 40, "learning_rate": 5e-3, "schedule": "constant"},
        "checkpoint": {"every_steps": 12, "keep_last": 0},
    }
    config = world.config(tmp_path / "run.toml", settings)
    commands.train(config, "train.max_steps=5")
    folder = commands.train(config)  # goes on
    losses = column(folder, "loss")
    assert losses[-1] < 0.05 < 3.0 < losses[0]
    undisturbed = commands.train(world.config(tmp_path / "other.toml", settings), "train.max_steps=12")
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        one, other = (run / "checkpoints" / "step-000012" / name for run in (folder, undisturbed))
        assert one.read_bytes() == other.read_bytes()

    base = ("--base", world.base)
    commands.run("tools/merge_lora.py", *base, "--adapter", folder / "adapter", "--output", tmp_path / "merged").ok()
    asked = ("--prompt", PROMPT, "--json", *(world.root / f"{colour}.mp4" for colour in ANSWERS))
    for model in ((world.base, "--adapter", folder / "adapter"), (tmp_path / "merged",)):
        lines = commands.run("tools/predict.py", "--model", *model, *asked).ok().stdout.splitlines()
        assert [json.loads(line)["prediction"] for line in lines] == list(ANSWERS.values())
