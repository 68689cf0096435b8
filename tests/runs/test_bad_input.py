"""A user's mistakes: one line that names the file, the field and the value; exit status 2; nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.runs.commands import CAPTION, Commands, column, metrics
from tests.runs.world import ANSWERS, PROMPT, World, damage, record, video_record

PREDICT, MERGE = "tools/predict.py", "tools/merge_lora.py"


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """A copy of the world to spoil."""
    copy = World(tmp_path / "data", tmp_path / "base", world.other_base, world.family)
    shutil.copytree(world.root, copy.root)
    shutil.copytree(world.base, copy.base)
    return copy


def write_records(own: World, *records: Any) -> None:
    """Put records in the place of videos.json, a line each."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (own.root / "videos.json").write_text("".join(f"{line}\n" for line in lines))


def no_such_clip(own: World) -> list[str]:
    (own.root / "green.mp4").unlink()
    write_records(own, *map(video_record, ANSWERS))
    return ["videos.json:2", "videos[0]", str(own.root / "green.mp4"), "no such file"]


def a_text_named_mp4(own: World) -> list[str]:
    (own.root / "green.mp4").write_text("The quick brown fox.\n" * 50)
    write_records(own, *map(video_record, ANSWERS))
    return ["videos.json:2", "videos[0]", str(own.root / "green.mp4"), "no video"]


def an_empty_clip(own: World) -> list[str]:
    (own.root / "green.mp4").write_bytes(b"")
    return [str(own.root / "green.mp4"), "0 bytes"]


def a_clip_cut_off(own: World) -> list[str]:
    file = own.root / "green.mp4"
    file.write_bytes(file.read_bytes()[:600])  # the index of an MP4 file comes last
    return [str(file), "moov"]


def no_answer(own: World) -> list[str]:
    write_records(own, video_record("red"), record("<video>Who?", None, videos=["green.mp4"]))
    return ["videos.json:2", "messages", "assistant"]


def no_json(own: World) -> list[str]:
    write_records(own, video_record("red"), '{"messages": [}')
    return ["videos.json:2", "1 of 2 samples"]


def a_way_out_of_the_root(own: World) -> list[str]:
    shutil.copy(own.root / "red.mp4", own.root.parent / "secret.mp4")
    write_records(own, record("<video>Who?", "I.", videos=["../secret.mp4"]))
    return ["videos.json:1", "videos[0]", "'../secret.mp4'", "data.root"]


def more_placeholders_than_clips(own: World) -> list[str]:
    write_records(own, record("<video><video>Who?", "I.", videos=["red.mp4"]))
    return ["videos.json:1", "videos", "2 <video>", "1 video"]


def a_sample_longer_than_a_pack(own: World) -> list[str]:
    write_records(own, video_record("red"), record("<video>" + "long " * 400, "I.", videos=["green.mp4"]))
    return ["videos.json:2", "data.pack_tokens = 256"]


def no_records(own: World) -> list[str]:
    write_records(own)
    return ["videos.json", "no samples"]


def no_source(own: World) -> list[str]:
    (own.root / "videos.json").unlink()
    return [str(own.root / "videos.json")]


def a_missing_tensor(own: World) -> list[str]:
    file = own.base / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    return [str(own.base), "1 tensors", "model.layers.1.mlp.up_proj.weight"]


def a_misshapen_tensor(own: World) -> list[str]:
    file = own.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return [str(file), "model.norm.weight", "[63]", "[64]"]


def weights_cut_off(own: World) -> list[str]:
    file = own.base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return [str(file), "not a readable safetensors file"]


def no_weights(own: World) -> list[str]:
    (own.base / "model.safetensors").unlink()
    return [f"model.path = {str(own.base)!r}", "model.safetensors"]


def no_tokenizer(own: World) -> list[str]:
    (own.base / "tokenizer.json").unlink()
    (own.base / "tokenizer_config.json").unlink()
    return [str(own.base), "tokenizer"]


def a_config_that_is_no_json(own: World) -> list[str]:
    (own.base / "config.json").write_text("{")
    return [str(own.base), "config.json"]


def another_family(own: World) -> list[str]:
    (own.base / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return [str(own.base), "model_type = 'gpt2'", "qwen2_5_vl"]


BROKEN_DATA = [
    no_such_clip,
    a_text_named_mp4,
    an_empty_clip,
    a_clip_cut_off,
    no_answer,
    no_json,
    a_way_out_of_the_root,
    more_placeholders_than_clips,
    a_sample_longer_than_a_pack,
    no_records,
    no_source,
]
BROKEN_BASE = [
    a_missing_tensor,
    a_misshapen_tensor,
    weights_cut_off,
    no_weights,
    no_tokenizer,
    a_config_that_is_no_json,
    another_family,
]


@pytest.mark.parametrize("spoil", [*BROKEN_DATA, *BROKEN_BASE])
def test_broken_files(commands: Commands, own: World, tmp_path: Path, spoil: Callable[[World], list[str]]) -> None:
    expected = spoil(own)
    error = commands.run(CAPTION, own.config(tmp_path / "run.toml")).error
    assert [text for text in expected if text not in error] == [], error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.wrkers=2", ["command line", "data.wrkers = 2", "workers"]),
        ("train.max_steps", ["command line", "train.max_steps", "section.key=value"]),
        ("train.max_steps=many", ["command line", 'train.max_steps = "many"', "whole number"]),
        ("train.learning_rate=-1", ["command line", "train.learning_rate = -1", "greater than 0"]),
        ("lora.targets=['q_proj']", ["command line", 'lora.targets.0 = "q_proj"', "component"]),
        ("lora.targets=['language_model.x_proj']", ["lora.targets", "language_model.x_proj", "q_proj"]),
        ("lora=", ["model.train = []", "[lora]"]),
        ("model.train=['projector']", ["model.train", "[lora]"]),
        ("data.pack_tokens=40", ["videos.json:1", "data.pack_tokens"]),
        ("data.root=none", ["none/videos.json"]),
        ("data.sources.0.format=parquet", ["data.sources.0.format", "parquet", "messages"]),
        ("model.path=none/such", ["model.path = 'none/such'"]),
        ("model.adapter=none/such", ["none/such", "adapter_config.json"]),
        ("parallel.shard=3", ["parallel.shard = 3", "1"]),
        ("eval.sources=[{format='messages',path='none.json'}]", ["none.json"]),
    ],
)
def test_wrong_settings(world: World, commands: Commands, tmp_path: Path, override: str, expected: list[str]) -> None:
    evaluates = ["eval.every_steps=1"] if override.startswith("eval.") else []
    error = commands.run(CAPTION, world.config(tmp_path / "run.toml"), override, *evaluates).error
    assert [text for text in expected if text not in error] == [], error
    assert not (tmp_path / "run").exists()


def test_an_unknown_key_in_the_file(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"train": {"packs_per_stepp": 4}})
    error = commands.run(CAPTION, config).error
    assert error == f"error: {config}: train.packs_per_stepp = 4: unknown key; did you mean packs_per_step?"


def test_a_file_that_is_not_there_or_no_toml(commands: Commands, tmp_path: Path) -> None:
    assert str(tmp_path / "none.toml") in commands.run(CAPTION, tmp_path / "none.toml").error
    (tmp_path / "odd.toml").write_text("output_dir = \n")
    assert str(tmp_path / "odd.toml") in commands.run(CAPTION, tmp_path / "odd.toml").error


def test_packs_that_the_processes_can_not_share(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"train": {"packs_per_step": 3}})
    # As torchrun tells them; all of them end before they look for each other.
    for rank in "01":
        result = commands.run(CAPTION, config, RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank)
        if rank == "0":
            assert "train.packs_per_step = 3" in result.error and "processes, 2" in result.error
        else:
            assert (result.status, result.stderr) == (2, "")
    assert not (tmp_path / "run").exists()


def test_the_folder_of_another_run(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"train": {"max_steps": 1}})
    folder = commands.train(config)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for override, shown in (("train.learning_rate=0.5", "0.5"), ("lora.rank=2", "2"), ("seed=1", "1")):
        error = commands.run(CAPTION, config, override).error
        key = override.partition("=")[0]
        assert all(text in error for text in (str(folder / "config.toml"), f"{key} = ", shown, "output_dir")), error
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_can_not_be_made(world: World, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        error = commands.run(CAPTION, world.config(tmp_path / "run.toml"), f"output_dir={output}").error
        assert "output_dir" in error and str(output) in error
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------------------- adapters


def test_an_adapter_of_another_base(world: World, commands: Commands, learned: Path, tmp_path: Path) -> None:
    adapter = learned / "adapter"
    config = world.config(
        tmp_path / "run.toml",
        {"model": {"path": str(world.other_base), "adapter": str(adapter)}, "lora": {"rank": 8, "alpha": 16}},
    )
    merge = ("--base", world.other_base, "--adapter", adapter, "--output", tmp_path / "merged")
    predict = ("--model", world.other_base, "--adapter", adapter, world.root / "red.mp4")
    for command in ((CAPTION, config), (MERGE, *merge), (PREDICT, *predict)):
        result = commands.run(*command)
        named = (str(adapter), "base_model_name_or_path", str(world.base), str(world.other_base))
        assert [text for text in named if text not in result.error] == [], result.error
        assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_an_adapter_of_another_rank(world: World, commands: Commands, learned: Path, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"model": {"adapter": str(learned / "adapter")}})
    error = commands.run(CAPTION, config).error  # rank 8 on file, 4 asked for
    assert str(learned / "adapter") in error and "[8, 64]" in error and "[4, 64]" in error
    assert not (tmp_path / "run").exists()


def _not_json(adapter: Path) -> str:
    (adapter / "adapter_config.json").write_text("{")
    return "adapter_config.json"


def _no_rank(adapter: Path) -> str:
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["r"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return "adapter_config.json"


def _no_adapter_weights(adapter: Path) -> str:
    (adapter / "adapter_model.safetensors").unlink()
    return "adapter_model.safetensors"


def _adapter_cut_off(adapter: Path) -> str:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


@pytest.mark.parametrize("spoil", [_not_json, _no_rank, _no_adapter_weights, _adapter_cut_off])
def test_a_broken_adapter(
    world: World, commands: Commands, learned: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    adapter = shutil.copytree(learned / "adapter", tmp_path / "adapter")
    name = spoil(adapter)
    merge = ("--base", world.base, "--adapter", adapter, "--output", tmp_path / "merged")
    predict = ("--model", world.base, "--adapter", adapter, world.root / "red.mp4")
    for command in ((MERGE, *merge), (PREDICT, *predict)):
        error = commands.run(*command).error
        assert str(adapter) in error and name in error, error
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "none/such"), ["'none/such'"]),
        (("--adapter", "none/such"), ["--adapter", "none/such"]),
        (("--frames", "0"), ["frames", "0"]),
        (("--fps", "-1"), ["fps", "-1"]),
        (("--max-pixels", "10"), ["max_pixels", "10"]),
        (("--max-new-tokens", "0"), ["--max-new-tokens", "0"]),
        (("--temperature", "-1"), ["--temperature", "-1"]),
        (("--top-p", "0"), ["--top-p", "0"]),
    ],
)
def test_wrong_options_of_predict(
    world: World, commands: Commands, arguments: tuple[str, ...], expected: list[str]
) -> None:
    model = () if "--model" in arguments else ("--model", world.base)
    error = commands.run(PREDICT, *model, *arguments, world.root / "red.mp4").error
    assert [text for text in expected if text not in error] == [], error


@pytest.mark.parametrize("spoil", [a_missing_tensor, weights_cut_off])
def test_tools_on_a_broken_base(
    commands: Commands, own: World, learned: Path, tmp_path: Path, spoil: Callable[[World], list[str]]
) -> None:
    spoil(own)
    adapter = learned / "adapter"
    merge = ("--base", own.base, "--adapter", adapter, "--output", tmp_path / "merged")
    for command in ((MERGE, *merge), (PREDICT, "--model", own.base, own.root / "red.mp4")):
        assert str(own.base) in commands.run(*command).error
    assert not (tmp_path / "merged").exists()


# -------------------------------------------------------------------------------------------------------- bad clips


MANY = {
    "data": {"max_samples_per_pack": 1, "max_bad_fraction": 0.3},
    "train": {"max_steps": 8, "packs_per_step": 2, "schedule": "constant"},
    "checkpoint": {"every_steps": 2},
}


def quarantine(folder: Path) -> list[dict[str, str]]:
    """What quarantine.jsonl holds."""
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_a_clip_that_is_no_video_is_left_out(commands: Commands, own: World, tmp_path: Path) -> None:
    a_text_named_mp4(own)
    digests = []
    for name in ("first", "second"):
        folder = commands.train(own.config(tmp_path / f"{name}.toml", MANY))
        (bad,) = quarantine(folder)
        assert list(bad) == ["id", "path", "reason", "message"]
        assert (bad["id"], bad["path"], bad["reason"]) == ("green", str(own.root / "green.mp4"), "not_a_video")
        assert bad["path"] in bad["message"]
        digests.append(column(folder, "sample_digest"))
        assert column(folder, "samples") == [2] * 8
    assert digests[0] == digests[1]


def test_a_clip_damaged_in_the_middle_is_replaced(commands: Commands, own: World, tmp_path: Path) -> None:
    damage(own.root / "green.mp4")
    runs = [own.config(tmp_path / f"{name}.toml", MANY) for name in ("straight", "halves")]
    commands.train(runs[0])
    # A run that is interrupted agrees: what it found is part of its state.
    commands.train(runs[1], "train.max_steps=4")
    commands.train(runs[1])
    lines = []
    for config in runs:
        folder = config.with_suffix("")
        (bad,) = quarantine(folder)
        assert (bad["id"], bad["path"], bad["reason"]) == ("green", str(own.root / "green.mp4"), "decode_error")
        assert column(folder, "samples") == [2] * 8  # another took its place in each of the four epochs
        lines.append([(line["loss"], line["sample_digest"]) for line in metrics(folder)])
    assert lines[0] == lines[1]


def test_too_many_damaged_clips_stop_the_run(commands: Commands, own: World, tmp_path: Path) -> None:
    damage(own.root / "green.mp4")
    result = commands.run(CAPTION, own.config(tmp_path / "run.toml", MANY), "data.max_bad_fraction=0.02")
    assert result.status == 2 and "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    expected = ("error: ", str(own.root / "green.mp4"), "1 of 4", "data.max_bad_fraction = 0.02")
    assert [text for text in expected if text not in error] == [], error
    assert not (tmp_path / "run" / "adapter").exists()
    assert [bad["id"] for bad in quarantine(tmp_path / "run")] == ["green"]


def test_a_damaged_clip_is_an_error_of_predict(commands: Commands, own: World, learned: Path, tmp_path: Path) -> None:
    damage(own.root / "green.mp4")
    clips = (own.root / "green.mp4", own.root / "red.mp4")
    model = ("--model", own.base, "--adapter", learned / "adapter", "--prompt", PROMPT, "--json")
    result = commands.run(PREDICT, *model, *clips)
    assert result.status == 1
    assert [json.loads(line)["prediction"] for line in result.stdout.splitlines()] == [ANSWERS["red"]]
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and str(clips[0]) in line


@pytest.mark.slow
def test_two_processes_replace_as_one_does(commands: Commands, own: World, tmp_path: Path) -> None:
    damage(own.root / "green.mp4")
    one = commands.train(own.config(tmp_path / "one.toml", MANY))
    two = own.config(tmp_path / "two.toml", MANY)
    commands.torchrun(2, two, "data.workers=1").ok()
    assert column(two.with_suffix(""), "sample_digest") == column(one, "sample_digest")
    assert quarantine(two.with_suffix("")) == quarantine(one)
