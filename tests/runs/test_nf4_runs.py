"""A run on a base of 4 bits, from clips to answers: what it learns, what its adapter is worth elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs.commands import CAPTION, Commands, column, largest_difference, metrics
from tests.runs.world import ANSWERS, PROMPT, World

NF4: dict[str, Any] = {"model": {"quantize": "nf4"}}


@pytest.fixture(scope="module")
def packed(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that knows the answers to the clips by heart, evaluated at its end."""
    settings = {
        "lora": {"rank": 8, "alpha": 16},
        "train": {"max_steps": 60, "learning_rate": 1e-2, "schedule": "linear", "precision": "bf16"},
        "eval": {"every_steps": 60, "at_start": False, "max_new_tokens": 40},
    }
    return commands.train(world.config(tmp_path_factory.mktemp("nf4") / "run.toml", settings, NF4))


def answers(commands: Commands, *arguments: object) -> dict[str, str]:
    lines = commands.run("tools/predict.py", "--prompt", PROMPT, "--json", *arguments).ok().stdout.splitlines()
    return {Path(line["video"]).stem: line["prediction"] for line in map(json.loads, lines)}


def test_learnt_by_heart_and_said_again(world: World, commands: Commands, packed: Path) -> None:
    """In training, and by tools/predict.py and tools/evaluate.py on the base in 4 bits."""
    lines = metrics(packed)
    assert lines[0]["loss"] > 3.0 and lines[-2]["loss"] < 0.05 and lines[-1]["eval_loss"] < 0.05
    said = [json.loads(line) for line in (packed / "predictions" / "step-000060.jsonl").read_text().splitlines()]
    assert {row["id"]: row["prediction"] for row in said} == ANSWERS
    clips = [world.root / f"{colour}.mp4" for colour in ANSWERS]
    adapted = ("--model", world.base, "--adapter", packed / "adapter")
    assert answers(commands, *adapted, "--quantize", "nf4", "--precision", "bf16", *clips) == ANSWERS
    scored = ("tools/evaluate.py", packed / "config.toml", "--adapter", packed / "adapter")
    commands.run(*scored, "--output", packed.parent / "scores").ok()
    scores = json.loads((packed.parent / "scores" / "scores.json").read_text())["adapter"]
    assert scores["loss"]["value"] == pytest.approx(lines[-1]["eval_loss"], rel=1e-3)


def test_merged_into_the_base_as_it_was(world: World, commands: Commands, packed: Path, tmp_path: Path) -> None:
    """Not into the rounded weights: the merged model is the base's with the adapter, and answers as these two do."""
    arguments = ("--base", world.base, "--adapter", packed / "adapter", "--output", tmp_path / "merged")
    commands.run("tools/merge_lora.py", *arguments).ok()
    base, merged = (load_file(folder / "model.safetensors") for folder in (world.base, tmp_path / "merged"))
    adapter = load_file(packed / "adapter" / "adapter_model.safetensors")
    changed = 0
    for name, before in base.items():
        module = name.removeprefix("model.").removesuffix(".weight")
        key = f"base_model.model.model.language_model.{module}"
        if f"{key}.lora_A.weight" in adapter:
            a, b = (adapter[f"{key}.lora_{x}.weight"].double() for x in "AB")
            torch.testing.assert_close(merged[name].double(), before.double() + 2 * (b @ a), rtol=1e-5, atol=1e-6)
            changed += 1
        else:
            assert torch.equal(merged[name], before), name
    assert changed == len(adapter) // 2 == 21
    clips = [world.root / f"{colour}.mp4" for colour in ANSWERS]
    apart = answers(commands, "--model", world.base, "--adapter", packed / "adapter", *clips)
    assert answers(commands, "--model", tmp_path / "merged", *clips) == apart


def test_going_on_with_other_weights_is_refused(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"train": {"max_steps": 2}}, NF4)
    commands.train(config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    error = commands.run(CAPTION, config, "train.max_steps=4", "model.quantize=none").error
    assert "model.quantize = 'nf4' in the run that is there, 'none' asked for" in error
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    commands.train(config, "train.max_steps=4")
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]


def test_full_fine_tuning_is_refused(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"lora": None, "model": {"train": ["language_model"]}}, NF4)
    error = commands.run(CAPTION, config).error
    assert 'model.quantize = "nf4" needs a [lora] table' in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("clips", "steps"), [(64, 3), pytest.param(64, 20, marks=pytest.mark.slow)])
def test_losses_are_nearly_those_of_bf16(commands: Commands, tmp_path: Path, clips: int, steps: int) -> None:
    """Steps of the demo's recipe on what its base has learnt: within 2 % at every step, and not equal."""
    data = ("tags", tmp_path / "data", "--train", clips, "--held-out", 1, "--processes", 1)
    commands.run("tools/demo_world/make_data.py", *data).ok()
    changed = {
        "data.root": tmp_path / "data",
        "data.sources": '[{format = "llava_video", path = "0_30_s_demo/0_30_s_demo_tags_train.json"}, '
        '{format = "messages", path = "sentences.jsonl", repeats = 3.0}]',
        "data.workers": 0,
        "train.max_steps": steps,
        "train.warmup_steps": 0,
        "train.learning_rate": 1e-3,
        "train.precision": "bf16",
        "eval.every_steps": 0,
    }
    losses = []
    for quantize in ("none", "nf4"):
        folder = tmp_path / quantize
        given = {**changed, "output_dir": folder, "model.quantize": quantize}
        commands.run(CAPTION, "recipes/demo/caption.toml", *(f"{key}={value}" for key, value in given.items())).ok()
        losses.append(column(folder, "loss"))
    difference = largest_difference(*losses)
    print(f"largest relative difference of a loss: {difference:.2%}")  # pytest -rP shows it
    assert len(losses[1]) == steps and 1e-4 < difference <= 0.02
