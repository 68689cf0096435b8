"""From clips to answers: train, merge, predict."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.runs.commands import CAPTION, Commands, Result, column, metrics
from tests.runs.world import ANSWERS, PROMPT, World

STEP_KEYS = {
    *("step", "epoch", "loss", "num_targets", "tokens", "samples", "grad_norm", "lr", "step_time_s", "data_wait_s"),
    *("tokens_per_s", "samples_per_s", "frames_per_s", "tflops", "mfu", "hfu", "peak_memory_bytes", "sample_digest"),
}
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "vft.json"}


KEYS = {"video", "prompt", "prediction", "cut_off"}
"""Of a line; the last one where an answer was cut off."""


def predictions(result: Result) -> dict[str, str]:
    """Answers by the name of the clip, from `--json`."""
    lines = [json.loads(line) for line in result.ok().stdout.splitlines()]
    assert all(list(line)[:3] == ["video", "prompt", "prediction"] and set(line) <= KEYS for line in lines), lines
    return {Path(line["video"]).stem: line["prediction"] for line in lines}


@pytest.fixture(scope="module")
def clips(world: World) -> list[Path]:
    """The clips, in another order than they were trained in."""
    return [world.root / f"{colour}.mp4" for colour in reversed(ANSWERS)]


@pytest.fixture(scope="module")
def merged(world: World, commands: Commands, learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the adapter in it."""
    output = tmp_path_factory.mktemp("merged") / "model"
    arguments = ("--base", world.base, "--adapter", learned / "adapter", "--output", output)
    commands.run("tools/merge_lora.py", *arguments).ok()
    return output


def test_what_a_run_leaves(learned: Path) -> None:
    left = {path.name for path in learned.iterdir()}
    assert left == {".lock", "config.toml", "metrics.jsonl", "checkpoints", "adapter", "quarantine.jsonl"} | {
        "run.json",
        "report.html",
    }
    assert {path.name for path in (learned / "adapter").iterdir()} == ADAPTER_FILES
    assert [path.name for path in (learned / "checkpoints").iterdir()] == ["step-000060"]
    assert (learned / "quarantine.jsonl").read_text() == ""


def test_a_step_is_one_line_of_documented_keys(learned: Path) -> None:
    lines = metrics(learned)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert all(set(line) == STEP_KEYS for line in lines)
    last = lines[-1]
    # A pack holds three of the four clips at most: two packs are an epoch.
    assert (last["samples"], last["epoch"]) == (4, 59)
    assert last["num_targets"] == lines[0]["num_targets"] > 4 * 8
    assert last["tokens_per_s"] == pytest.approx(last["tokens"] / last["step_time_s"])
    assert 0 <= last["data_wait_s"] < last["step_time_s"]
    frames_a_sample = last["frames_per_s"] / last["samples_per_s"]
    assert frames_a_sample == pytest.approx(round(frames_a_sample)) and frames_a_sample >= 4
    assert last["tflops"] > 0 and last["mfu"] is last["hfu"] is None  # the peak of a CPU isn't known


def test_a_trace_of_some_steps(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {"train": {"max_steps": 3}, "log": {"profile_steps": [2, 3]}}
    folder = commands.train(world.config(tmp_path / "run.toml", settings))
    trace = json.loads(gzip.decompress((folder / "profile" / "rank-0.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]
    assert names.count("aten::_fused_adamw_") == 2 and any("attention" in name for name in names)


def test_memory_decides_on_checkpointing(world: World, commands: Commands, tmp_path: Path) -> None:
    """The same losses; what was tried is told; a budget that nothing fits ends the run before it begins."""
    plain = commands.train(world.config(tmp_path / "plain.toml", {"train": {"max_steps": 2}}))
    auto = ("parallel.activation_checkpointing=auto", f"output_dir={tmp_path / 'auto'}")
    config = world.config(tmp_path / "auto.toml", {"train": {"max_steps": 2}})
    told = commands.run(CAPTION, config, *auto, "parallel.memory_budget_gib=10.0").ok().stderr
    assert "activation_checkpointing = none, shard = 0, compile = false: 0.0 GiB of 10.0" in told
    assert column(plain, "loss") == column(tmp_path / "auto", "loss")
    refused = commands.run(
        CAPTION, config, *auto[:1], f"output_dir={tmp_path / 'no'}", "parallel.memory_budget_gib=1e-5"
    )
    assert refused.status == 2 and "even with full activation checkpointing" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_answers_come_back_word_for_word(world: World, commands: Commands, learned: Path, clips: list[Path]) -> None:
    model = ("--model", world.base, "--adapter", learned / "adapter", "--prompt", PROMPT)
    assert predictions(commands.run("tools/predict.py", *model, "--json", *clips)) == ANSWERS
    plain = commands.run("tools/predict.py", *model, *clips).ok()
    assert plain.stdout.splitlines() == [f"{clip}: {ANSWERS[clip.stem]}" for clip in clips]


def test_a_merged_model_answers_the_same(commands: Commands, merged: Path, clips: list[Path]) -> None:
    # No option says how frames are taken: that comes along with the merged model.
    arguments = ("--model", merged, "--prompt", PROMPT, "--json")
    assert predictions(commands.run("tools/predict.py", *arguments, *clips)) == ANSWERS


def test_a_merged_model_has_the_files_and_tensors_of_its_base(world: World, merged: Path) -> None:
    own = {
        "README.md",
        "vft.json",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
    }
    assert {path.name for path in merged.iterdir()} == {path.name for path in world.base.iterdir()} | own
    headers = []
    for folder in (world.base, merged):
        with safe_open(folder / "model.safetensors", framework="pt") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
            headers.append({name: (part.get_shape(), part.get_dtype()) for name, part in slices.items()})
    assert headers[0] == headers[1]


def test_a_clip_that_fails_costs_its_own_answer_alone(
    world: World, commands: Commands, learned: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    clips = (text, world.root / "red.mp4", tmp_path / "none.mp4")
    model = ("--model", world.base, "--adapter", learned / "adapter", "--prompt", PROMPT, "--json")
    result = commands.run("tools/predict.py", *model, *clips)
    assert result.status == 1
    assert [json.loads(line)["prediction"] for line in result.stdout.splitlines()] == [ANSWERS["red"]]
    errors = result.stderr.splitlines()
    assert [str(path) in line for path, line in zip((text, clips[2]), errors, strict=True)] == [True, True], errors
    assert all(line.startswith("error: ") for line in errors)


def test_evaluation_while_training(world: World, commands: Commands, learned: Path, tmp_path: Path) -> None:
    settings = {
        "model": {"adapter": str(learned / "adapter")},
        "lora": {"rank": 8, "alpha": 16},
        "train": {"max_steps": 2, "learning_rate": 1e-6},
        "eval": {"every_steps": 1, "max_new_tokens": 40},
    }
    folder = commands.train(world.config(tmp_path / "eval.toml", settings))
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2]
    for line in lines[::2]:
        assert set(line) >= {"step", "eval_cider_d", "eval_loss"}
        # The adapter knows the answers: what is said and how likely it is agree.
        assert line["eval_loss"] == pytest.approx(lines[1]["loss"], abs=0.05)
        assert all(key == "step" or key.startswith("eval_") for key in line), line
    for step in (0, 1, 2):
        text = (folder / "predictions" / f"step-{step:06d}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert [list(row) for row in rows] == [["id", "prompt", "prediction", "reference", "source", "media"]] * 4
        assert {row["id"]: row["prediction"] for row in rows} == ANSWERS
        assert all(row["prompt"] == PROMPT and row["prediction"] == row["reference"] for row in rows)


def test_text_and_pictures_are_learnt_too(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {
        "lora": {"rank": 8, "alpha": 16},
        "data": {"sources": [{"format": "messages", "path": "mixed.jsonl"}]},
        "train": {"max_steps": 80, "learning_rate": 1e-2, "schedule": "linear"},
    }
    folder = commands.train(world.config(tmp_path / "mixed.toml", settings))
    assert metrics(folder)[-1]["loss"] < 0.05
    model = ("--model", world.base, "--adapter", folder / "adapter", "--json")
    pictures = [world.root / f"{colour}.png" for colour in ("red", "blue")]
    answers = predictions(commands.run("tools/predict.py", *model, "--prompt", "Which colour?", *pictures))
    assert answers == {"red": "It is red.", "blue": "It is blue."}


def test_full_fine_tuning_leaves_a_model(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {
        "lora": None,
        "model": {"train": ["language_model", "projector"]},
        "train": {"max_steps": 60, "learning_rate": 3e-3, "schedule": "linear"},
    }
    folder = commands.train(world.config(tmp_path / "full.toml", settings))
    assert metrics(folder)[-1]["loss"] < 0.05
    assert not (folder / "adapter").exists()
    clips = [world.root / f"{colour}.mp4" for colour in ANSWERS]
    arguments = ("--model", folder / "model", "--prompt", PROMPT, "--json")
    assert predictions(commands.run("tools/predict.py", *arguments, *clips)) == ANSWERS
    # What isn't trained is the base's, bit for bit.
    with (
        safe_open(world.base / "model.safetensors", framework="pt") as before,
        safe_open(folder / "model" / "model.safetensors", framework="pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for name in before.keys():  # noqa: SIM118
            same = bool((before.get_tensor(name) == after.get_tensor(name)).all())
            assert same == (name.startswith("visual.") and "merger" not in name), name


def test_a_merge_never_overwrites(world: World, commands: Commands, learned: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious").write_text("mine")
    arguments = ("--base", world.base, "--adapter", learned / "adapter", "--output", tmp_path / "model")
    error = commands.run("tools/merge_lora.py", *arguments).error
    assert str(tmp_path / "model") in error
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "precious"]
