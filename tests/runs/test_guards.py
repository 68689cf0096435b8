"""What a run notices before it goes wrong in silence, and what it survives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from tests.runs.commands import CAPTION, Commands, column, largest_difference, metrics
from tests.runs.world import FULL_TUNING, World

INSPECT = "tools/inspect_batch.py"


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """A world whose files a test may change."""
    shutil.copytree(world.root, tmp_path / "data")
    shutil.copytree(world.base, tmp_path / "base")
    return World(tmp_path / "data", tmp_path / "base", world.other_base, world.family)


def test_resuming_with_other_samples_or_weights_is_refused(own: World, commands: Commands, tmp_path: Path) -> None:
    config = own.config(tmp_path / "run.toml", {"checkpoint": {"every_steps": 2}})
    commands.train(config, "train.max_steps=2")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    records = (own.root / "videos.json").read_text()
    (own.root / "videos.json").write_text(json.dumps(json.loads(records)[::-1][:3]))
    error = commands.run(CAPTION, config, "train.max_steps=4").stderr.splitlines()[-1]
    assert "step-000002" in error and "data = " in error and "samples" in error
    (own.root / "videos.json").write_text(records)
    for file in own.base.glob("*.safetensors"):
        shutil.copyfile(own.other_base / file.name, file)
    error = commands.run(CAPTION, config, "train.max_steps=4").stderr.splitlines()[-1]
    assert "base = " in error and "model.path" in error
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_resuming_with_edited_answers_is_refused(own: World, commands: Commands, tmp_path: Path) -> None:
    """Of as many tokens, so that every length is the same; trained or held out. Other held-out sources are not."""
    shutil.copyfile(own.root / "videos.json", own.root / "held.json")
    held = {"eval": {"every_steps": 2, "max_new_tokens": 2, "at_start": False}}
    held["eval"]["sources"] = [{"format": "messages", "path": "held.json"}]
    config = own.config(tmp_path / "run.toml", {"checkpoint": {"every_steps": 2}}, held)
    first = commands.run(CAPTION, config, "train.max_steps=2").ok()
    for colour in ("red", "green", "blue", "yellow"):  # the same clips
        assert f"{colour} ({colour}.mp4)" in first.stderr
    assert "4 of 4 held-out samples are also in training" in first.stderr
    commands.run(CAPTION, config, "train.max_steps=2").ok()
    for file, key in (("videos.json", "data"), ("held.json", "held_out")):
        before = (own.root / file).read_text()
        edit(own.root / file, "walks to the right", "walks to the left")
        error = commands.run(CAPTION, config, "train.max_steps=4").stderr.splitlines()[-1]
        assert error.startswith("error: ") and f"{key} = " in error and "changed since" in error, error
        (own.root / file).write_text(before)
    other = 'eval.sources=[{format="messages", path="held.json", take="first:2"}]'
    commands.run(CAPTION, config, "train.max_steps=4", other).ok()


def test_going_on_from_an_adapter_of_another_scale_is_refused(
    world: World, commands: Commands, learned: Path, tmp_path: Path
) -> None:
    settings = {"model": {"adapter": str(learned / "adapter")}, "lora": {"rank": 8, "alpha": 800}}
    error = commands.run(CAPTION, world.config(tmp_path / "run.toml", settings)).stderr.splitlines()[-1]
    assert "lora_alpha = 16" in error and "scale 2.0" in error and "100.0" in error


def test_a_second_run_in_the_same_folder_is_refused(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml")
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        error = commands.run(CAPTION, config).stderr.splitlines()[-1]
    assert "output_dir" in error and "another run" in error
    assert [path.name for path in (tmp_path / "run").iterdir()] in ([], [".lock"])


def test_a_warm_up_longer_than_the_run_is_refused(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {"train": {"max_steps": None, "epochs": 1, "warmup_steps": 50}}
    error = commands.run(CAPTION, world.config(tmp_path / "run.toml", settings)).stderr.splitlines()[-1]
    assert "warmup_steps = 50" in error and "1 steps" in error


def test_a_limit_on_bad_clips_may_be_raised_later(own: World, commands: Commands, tmp_path: Path) -> None:
    (own.root / "green.mp4").write_bytes(b"")
    config = own.config(tmp_path / "run.toml")
    assert "max_bad_fraction" in commands.run(CAPTION, config).error
    commands.train(config, "data.max_bad_fraction=0.5")
    assert len(metrics(tmp_path / "run")) == 4


def test_one_held_out_answer_is_no_reason_to_stop(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"eval": {"every_steps": 2, "max_samples": 1, "max_new_tokens": 4}})
    folder = commands.train(config)
    scores = [line for line in metrics(folder) if "eval_answered" in line]
    assert [line["eval_answered"] for line in scores] == [1, 1, 1]


def test_a_tied_head_that_was_saved_all_the_same(own: World, commands: Commands, tmp_path: Path) -> None:
    (file,) = own.base.glob("*.safetensors")
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    folder = commands.train(own.config(tmp_path / "run.toml", FULL_TUNING))
    exported = load_file(folder / "model" / file.name)
    assert exported.keys() == {*tensors, "lm_head.weight"}
    assert torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    assert not torch.equal(exported["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "mlp", "selective", "full"])
def test_compiled_layers_give_the_same_losses(world: World, commands: Commands, tmp_path: Path, mode: str) -> None:
    settings = {"train": {"max_steps": 6}, "parallel": {"activation_checkpointing": mode}}
    plain = commands.train(world.config(tmp_path / "plain.toml", settings))
    config = world.config(tmp_path / "compiled.toml", settings)
    ended = commands.run(CAPTION, config, "parallel.compile=true").ok()
    assert "recompile_limit" not in ended.stderr
    compiled = tmp_path / "compiled"
    assert largest_difference(column(plain, "loss"), column(compiled, "loss")) < 1e-5
