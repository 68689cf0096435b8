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
from vft.app.records import decoded
from vft.config import run as configs

PREDICT, MERGE = "tools/predict.py", "tools/merge_lora.py"


def assert_names(error: str, *texts: str) -> None:
    """The error names each of the texts."""
    assert [text for text in texts if text not in error] == [], error


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    """A copy of the world to spoil. Its videos.json has a line for each record."""
    copy = World(tmp_path / "data", tmp_path / "base", world.other_base, world.family)
    shutil.copytree(world.root, copy.root)
    shutil.copytree(world.base, copy.base)
    write_records(copy, *map(video_record, ANSWERS))
    return copy


def write_records(own: World, *records: Any) -> None:
    """Put records in the place of videos.json, a line each."""
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (own.root / "videos.json").write_text("".join(f"{line}\n" for line in lines))


Spoil = Callable[[World], object]


def records(*them: Any) -> Spoil:
    return lambda own: write_records(own, *them)


def asks(question: str, *videos: str, answer: str | None = "I.") -> dict[str, Any]:
    return record(question, answer, videos=list(videos))


def weights(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(own: World) -> None:
        tensors = load_file(own.base / "model.safetensors")
        change(tensors)
        save_file(tensors, own.base / "model.safetensors", metadata={"format": "pt"})

    return spoil


def cut(path: str, size: int) -> Spoil:
    """Keep the first bytes of a file; all but the last ones if `size` is negative."""

    def spoil(own: World) -> None:
        file = own.root.parent / path
        file.write_bytes(file.read_bytes()[:size])

    return spoil


def write(path: str, text: str) -> Spoil:
    return lambda own: (own.root.parent / path).write_text(text)


def remove(*paths: str) -> Spoil:
    return lambda own: [(own.root.parent / path).unlink() for path in paths]


def way_out(own: World) -> None:
    shutil.copy(own.root / "red.mp4", own.root.parent / "secret.mp4")
    write_records(own, asks("<video>Who?", "../secret.mp4"))


a_missing_tensor = weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
weights_cut_off = cut("base/model.safetensors", -1000)
red = video_record("red")
BROKEN: dict[str, tuple[Spoil, str]] = {
    "no such clip": (remove("data/green.mp4"), "videos.json:2 | videos[0] | {root}/green.mp4 | no such file"),
    "a text named mp4": (
        write("data/green.mp4", "The quick brown fox.\n" * 50),
        "videos.json:2 | videos[0] | {root}/green.mp4 | no video",
    ),
    "an empty clip": (cut("data/green.mp4", 0), "{root}/green.mp4 | 0 bytes"),
    "a clip cut off": (cut("data/green.mp4", 600), "{root}/green.mp4 | moov"),  # its index comes last
    "no answer": (
        records(red, asks("<video>Who?", "green.mp4", answer=None)),
        "videos.json:2 | messages | assistant",
    ),
    "no json": (records(red, '{"messages": [}'), "videos.json:2 | 1 of 2 samples"),
    "a way out of the root": (way_out, "videos.json:1 | videos[0] | '../secret.mp4' | data.root"),
    "more placeholders than clips": (
        records(asks("<video><video>Who?", "red.mp4")),
        "videos.json:1 | videos | 2 <video> | 1 video",
    ),
    "a sample longer than a pack": (
        records(red, asks("<video>" + "long " * 400, "green.mp4")),
        "videos.json:2 | data.pack_tokens = 256",
    ),
    "no records": (records(), "videos.json | no samples"),
    "no source": (remove("data/videos.json"), "{root}/videos.json"),
    "a missing tensor": (a_missing_tensor, "{base} | 1 tensors | model.layers.1.mlp.up_proj.weight"),
    "a misshapen tensor": (
        weights(lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:-1].clone()})),
        "{base}/model.safetensors | model.norm.weight | [63] | [64]",
    ),
    "weights cut off": (weights_cut_off, "{base}/model.safetensors | not a readable safetensors file"),
    "no weights": (remove("base/model.safetensors"), "model.path = '{base}' | model.safetensors"),
    "no tokenizer": (remove("base/tokenizer.json", "base/tokenizer_config.json"), "{base} | tokenizer"),
    "a config that is no json": (write("base/config.json", "{"), "{base} | config.json"),
    "another family": (
        write("base/config.json", '{"model_type": "gpt2"}'),
        "{base} | model_type = 'gpt2' | qwen2_5_vl",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(commands: Commands, own: World, tmp_path: Path, name: str) -> None:
    spoil, expected = BROKEN[name]
    spoil(own)
    error = commands.run(CAPTION, own.config(tmp_path / "run.toml")).error
    assert_names(error, *expected.format(root=own.root, base=own.base).split(" | "))
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
        ("data.root=none", ["data.root = 'none'", "no such folder"]),
        ("data.sources.0.format=parquet", ["data.sources.0.format", "parquet", "messages"]),
        (
            "model.path=none/such",
            ["model.path = 'none/such'", "HF_HUB_OFFLINE", "hf download none/such", "model.path=DIR"],
        ),
        ("model.adapter=none/such", ["model.adapter = 'none/such'", "no such folder"]),
        ("parallel.shard=3", ["parallel.shard = 3", "1"]),
        ("eval.sources=[{format='messages',path='none.json'}]", ["none.json"]),
    ],
)
def test_wrong_settings(world: World, commands: Commands, tmp_path: Path, override: str, expected: list[str]) -> None:
    evaluates = ["eval.every_steps=1"] if override.startswith("eval.") else []
    error = commands.run(CAPTION, world.config(tmp_path / "run.toml"), override, *evaluates).error
    assert_names(error, *expected)
    assert not (tmp_path / "run").exists()


def test_what_is_accepted_is_warned_of(world: World, commands: Commands, tmp_path: Path) -> None:
    overrides = ("eval.every_steps=2", "train.learning_rate=1")
    done = commands.run(CAPTION, world.config(tmp_path / "run.toml"), "--dry-run", *overrides).ok()
    assert "those of training; eval.split = 0.1 would hold a tenth out" in done.stderr
    assert "warning: train.learning_rate = 1: a step moves each weight by about as much" in done.stderr


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
        assert_names(error, str(folder / "config.toml"), f"{key} = ", shown, "output_dir")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_can_not_be_made(world: World, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        error = commands.run(CAPTION, world.config(tmp_path / "run.toml"), f"output_dir={output}").error
        assert_names(error, "output_dir", str(output))
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
        assert_names(result.error, str(adapter), "base_model_name_or_path", str(world.base), str(world.other_base))
        assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


def test_an_adapter_of_another_rank(world: World, commands: Commands, learned: Path, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"model": {"adapter": str(learned / "adapter")}})
    error = commands.run(CAPTION, config).error  # rank 8 on file, 4 asked for
    assert_names(error, str(learned / "adapter"), "[8, 64]", "[4, 64]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adapter_config.json", lambda content: b"{"),
        ("adapter_config.json", lambda content: content.replace(b'"r":', b'"s":')),
        ("adapter_model.safetensors", None),
        ("adapter_model.safetensors", lambda content: content[:-100]),
    ],
    ids=["not json", "no rank", "no weights", "cut off"],
)
def test_a_broken_adapter(
    world: World,
    commands: Commands,
    learned: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[bytes], bytes] | None,
) -> None:
    adapter = shutil.copytree(learned / "adapter", tmp_path / "adapter")
    content = (adapter / name).read_bytes()
    (adapter / name).unlink()
    if change is not None:
        assert change(content) != content
        (adapter / name).write_bytes(change(content))
    merge = ("--base", world.base, "--adapter", adapter, "--output", tmp_path / "merged")
    predict = ("--model", world.base, "--adapter", adapter, world.root / "red.mp4")
    for command in ((MERGE, *merge), (PREDICT, *predict)):
        assert_names(commands.run(*command).error, str(adapter), name)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model", "none/such"), ["--model = 'none/such'", "HF_HUB_OFFLINE", "--model=DIR"]),
        (("--output", "x.csv"), ["--output = x.csv", "JSONL", "x.jsonl", "--table x.csv"]),
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
    assert_names(error, *expected)


@pytest.mark.parametrize("spoil", [a_missing_tensor, weights_cut_off], ids=["missing tensor", "cut off"])
def test_tools_on_a_broken_base(commands: Commands, own: World, learned: Path, tmp_path: Path, spoil: Spoil) -> None:
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


def test_a_damaged_clip_is_found_before_the_run(commands: Commands, own: World, tmp_path: Path) -> None:
    """In what is trained on and in what is held out; each once, however many records show it."""
    damage(own.root / "green.mp4")
    config = own.config(
        tmp_path / "run.toml", MANY, {"eval": {"sources": [{"format": "messages", "path": "videos.json"}]}}
    )
    look = ("tools/inspect_batch.py", config, "--output", tmp_path / "look", "--decode-all")
    done = commands.run(*look).ok()
    assert "videos and pictures: 1 can't be used" in done.stdout
    (bad,) = quarantine(tmp_path / "look")
    assert (bad["id"], bad["path"], bad["reason"]) == ("green", str(own.root / "green.mp4"), "decode_error")
    assert bad["path"] in (tmp_path / "look" / "preview.html").read_text()
    error = commands.run(*look, "data.max_bad_fraction=0.2").error
    assert "2 of 8 samples can't be used (2 decode_error), more than data.max_bad_fraction = 0.2" in error
    assert quarantine(tmp_path / "look") == [bad]
    *_, shown = decoded(configs.load(config, ["data.max_bad_fraction=0"]))
    assert "green.mp4" in shown and "What is wrong: 1" in shown


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
