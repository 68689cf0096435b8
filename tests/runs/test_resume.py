"""A run that was interrupted goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import CAPTION, REPOSITORY, Commands, column, largest_difference, metrics
from tests.runs.processes import descendants, run_together
from tests.runs.same import assert_same
from tests.runs.world import FULL_TUNING, World
from vft.common.rules import VERSION
from vft.training.checkpoint import find_damage

STEPS = 12
STOCHASTIC: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "data": {"max_samples_per_pack": 1},
    "train": {"max_steps": STEPS, "warmup_steps": 3, "weight_decay": 0.01, "packs_per_step": 3},
    "checkpoint": {"every_steps": 3, "keep_last": 3},
}
"""Dropout, a schedule, and epochs (of 4 packs) that end within a step (of 3): what could get lost."""


def wait_for_step(folder: Path, step: int, is_running: Callable[[], bool]) -> None:
    """Until `step` is on record, or the run has ended."""
    file = folder / "metrics.jsonl"
    while is_running() and (not file.exists() or file.read_bytes().count(b"\n") < step):
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    return commands.train(world.config(tmp_path_factory.mktemp("undisturbed") / "run.toml", STOCHASTIC))


@pytest.fixture
def copy(undisturbed: Path, world: World, tmp_path: Path) -> Path:
    """Its configuration, and its folder to spoil, in another place."""
    shutil.copytree(undisturbed, tmp_path / "run")
    return world.config(tmp_path / "run.toml", STOCHASTIC)


@pytest.mark.parametrize("settings", [{}, pytest.param(FULL_TUNING, marks=pytest.mark.slow)], ids=["lora", "full"])
def test_a_run_killed_at_random_steps(
    world: World, commands: Commands, undisturbed: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    if settings:
        undisturbed = commands.train(world.config(tmp_path / "undisturbed.toml", STOCHASTIC, settings))
    # A checkpoint after each step: the run is often killed while one is written.
    config = world.config(tmp_path / "run.toml", STOCHASTIC, settings, {"checkpoint": {"every_steps": 1}})
    folder, pick = config.with_suffix(""), random.Random(5)
    for latest in (4, 8, STEPS):
        command = commands.start(CAPTION, config)
        wait_for_step(folder, pick.randint(latest - 3, latest - 1), lambda command=command: command.is_running)
        assert command.kill().status == -signal.SIGKILL
    commands.train(config, "checkpoint.every_steps=3")
    assert_same(folder, undisturbed, STEPS)


def test_a_killed_run_leaves_no_process_behind(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", STOCHASTIC, {"data": {"workers": 1}, "train": {"max_steps": 10_000}})
    command = commands.start(CAPTION, config)
    wait_for_step(tmp_path / "run", 2, lambda: command.is_running)
    family = descendants(command.pid)
    assert len(family) >= 2  # the worker and the server that forks it
    command.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(_is_alive(pid) for pid in family):
        time.sleep(0.05)
    assert not [pid for pid in family if _is_alive(pid)]


def flip_a_bit(checkpoint: Path) -> str:
    """In the middle of the weights."""
    file = checkpoint / "trainable.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file.name


def cut_off(checkpoint: Path) -> str:
    """The optimizer's file."""
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return file.name


def lose_the_manifest(checkpoint: Path) -> str:
    """As if the machine had stopped before it was written."""
    (checkpoint / "manifest.json").unlink()
    return "manifest.json"


def lose_the_state(checkpoint: Path) -> str:
    """A file that the manifest names."""
    (checkpoint / "state.json").unlink()
    return "state.json"


def empty_the_manifest(checkpoint: Path) -> str:
    """As a full disk leaves it."""
    (checkpoint / "manifest.json").write_text("")
    return "manifest.json"


BREAK = [flip_a_bit, cut_off, lose_the_manifest, lose_the_state, empty_the_manifest]


@pytest.mark.parametrize("spoil", BREAK)
def test_a_damaged_checkpoint_is_noticed(undisturbed: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    newest = shutil.copytree(undisturbed / "checkpoints" / f"step-{STEPS:06d}", tmp_path / f"step-{STEPS:06d}")
    assert find_damage(newest) is None
    assert spoil(newest) in str(find_damage(newest))


def test_a_damaged_checkpoint_is_passed_over(commands: Commands, undisturbed: Path, copy: Path) -> None:
    folder = copy.with_suffix("")
    newest = folder / "checkpoints" / f"step-{STEPS:06d}"
    name = flip_a_bit(newest)
    result = commands.run(CAPTION, copy).ok()
    report = [line for line in result.stderr.splitlines() if line.startswith(str(newest))]
    assert len(report) == 1 and name in report[0], result.stderr
    assert f"going on from {folder / 'checkpoints' / f'step-{STEPS - 3:06d}'}" in result.stderr
    assert_same(folder, undisturbed, STEPS)


def test_an_unfinished_checkpoint_and_a_half_written_line_of_metrics_are_dropped(
    commands: Commands, undisturbed: Path, copy: Path
) -> None:
    folder = copy.with_suffix("")
    partial = folder / "checkpoints" / f".partial-step-{STEPS:06d}"
    (folder / "checkpoints" / f"step-{STEPS:06d}").rename(partial)
    (partial / "manifest.json").unlink()
    file = folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    commands.run(CAPTION, copy).ok()
    assert_same(folder, undisturbed, STEPS)


def test_no_whole_checkpoint_is_an_error(commands: Commands, copy: Path) -> None:
    folder = copy.with_suffix("")
    before = metrics(folder)
    for number, checkpoint in enumerate(sorted((folder / "checkpoints").iterdir())):
        BREAK[number % len(BREAK)](checkpoint)
    result = commands.run(CAPTION, copy)
    assert result.status == 2
    assert "Traceback" not in result.stderr
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ") and str(folder / "checkpoints") in error and "none of 3" in error
    assert metrics(folder) == before  # nothing is thrown away


@pytest.mark.parametrize("kept", [0, -1], ids=["base", "last"])
def test_an_evaluation_without_its_scores_is_made_again(
    world: World, commands: Commands, tmp_path: Path, kept: int
) -> None:
    """The kill came between the answers and the line of metrics: of the base, whose run has no checkpoint yet, or of
    the last step."""
    settings = {
        "train": {"max_steps": 2, "warmup_steps": 1},
        "eval": {"every_steps": 2, "max_new_tokens": 4, "best_metric": "loss"},
    }
    undisturbed = commands.train(world.config(tmp_path / "undisturbed.toml", STOCHASTIC, settings))
    assert column(undisturbed, "step") == [0, 1, 2, 2]
    config = world.config(tmp_path / "run.toml", STOCHASTIC, settings)
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:kept]))
    (folder / "best.json").unlink()
    if not kept:
        shutil.rmtree(folder / "checkpoints")
    commands.train(config)
    assert_same(folder, undisturbed, 2)


def test_the_command_of_a_finished_run_changes_nothing(commands: Commands, copy: Path) -> None:
    folder = copy.with_suffix("")
    os.utime(folder / "metrics.jsonl", (0, 1e9))  # reports show when it was last written
    said = commands.run(CAPTION, copy).ok().stderr
    assert f"nothing left to train: step {STEPS} of {STEPS} is done" in said and "longest row" not in said
    assert (folder / "metrics.jsonl").stat().st_mtime == 1e9
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for config in (copy, folder / "config.toml"):  # the resolved configuration is one too
        commands.run(CAPTION, config).ok()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_workers_prefetch_and_synchronous_saves_change_nothing(
    world: World, commands: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    settings = {"data": {"workers": 2, "prefetch_packs": 3}, "checkpoint": {"asynchronous": False}}
    folder = commands.train(world.config(tmp_path / "run.toml", STOCHASTIC, settings))
    assert_same(folder, undisturbed, STEPS)


def test_a_finished_run_can_be_prolonged(world: World, commands: Commands, tmp_path: Path) -> None:
    settings = {"train": {"schedule": "constant"}}
    straight = commands.train(world.config(tmp_path / "straight.toml", STOCHASTIC, settings))
    longer = world.config(tmp_path / "longer.toml", STOCHASTIC, settings)
    commands.train(longer, "train.max_steps=5")
    commands.train(longer)
    assert_same(longer.with_suffix(""), straight, STEPS)


def test_epochs_end_at_their_last_sample(world: World, commands: Commands, tmp_path: Path) -> None:
    # 3 epochs of 4 packs are 12 packs: with 5 a step the third step is filled up with empty ones.
    settings = {"train": {"max_steps": None, "epochs": 3, "packs_per_step": 5}}
    config = world.config(tmp_path / "run.toml", STOCHASTIC, settings)
    folder = commands.train(config)
    assert column(folder, "samples") == [5, 5, 2]
    assert column(folder, "epoch") == [1, 2, 2]
    lines = metrics(folder)
    commands.train(config)
    assert metrics(folder) == lines


def test_another_number_of_processes(commands: Commands, undisturbed: Path, copy: Path) -> None:
    folder = copy.with_suffix("")
    for checkpoint in sorted((folder / "checkpoints").iterdir())[1:]:
        shutil.rmtree(checkpoint)
    # A step of 3 packs can be shared by 3 processes.
    first, *_ = [result.ok() for result in run_together(commands, 3, CAPTION, copy)]
    assert f"going on from {folder / 'checkpoints' / f'step-{STEPS - 6:06d}'}" in first.stderr
    for key in ("step", "epoch", "sample_digest", "num_targets", "tokens", "samples", "lr"):
        assert column(folder, key) == column(undisturbed, key)
    assert largest_difference(column(undisturbed, "loss"), column(folder, "loss")) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_killed(world: World, commands: Commands, tmp_path: Path, victim: int) -> None:
    settings = {"train": {"packs_per_step": 4}}
    undisturbed = world.config(tmp_path / "undisturbed.toml", STOCHASTIC, settings)
    commands.torchrun(2, undisturbed).ok()
    config = world.config(tmp_path / "run.toml", STOCHASTIC, settings)
    folder = config.with_suffix("")
    words = [sys.executable, *commands.torchrun_words(2, config)[1:]]
    with subprocess.Popen(
        words, cwd=REPOSITORY, env=commands.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as launcher:
        wait_for_step(folder, 7, lambda: launcher.poll() is None)
        ranks = {_environment(pid).get("RANK"): pid for pid in _children(launcher.pid)}
        os.kill(ranks[str(victim)], signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0  # the other one doesn't wait for ever
    assert len(metrics(folder)) < STEPS
    commands.torchrun(2, config).ok()
    assert_same(folder, undisturbed.with_suffix(""), STEPS)


@pytest.mark.slow
def test_two_processes_without_a_whole_checkpoint_end_with_one_error(commands: Commands, copy: Path) -> None:
    for checkpoint in (copy.with_suffix("") / "checkpoints").iterdir():
        flip_a_bit(checkpoint)
    result = commands.torchrun(3, copy)
    assert result.status != 0
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1, result.stderr


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in text.read_text().split()] if text.exists() else []


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_state_is_json_and_safetensors_alone(undisturbed: Path) -> None:
    names = {path.name for path in (undisturbed / "checkpoints" / f"step-{STEPS:06d}").iterdir()}
    assert names == {"trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    state = json.loads((undisturbed / "checkpoints" / f"step-{STEPS:06d}" / "state.json").read_text())
    digests = {state.pop(name) for name in ("data", "base")}
    assert len(digests) == 2 and all(re.fullmatch(r"[0-9a-f]{16,64}", digest) for digest in digests)
    samples = sum(line["samples"] for line in metrics(undisturbed))
    cursor = {"epoch": 8, "pack": 4, "step": STEPS}
    about = json.loads((undisturbed / "adapter" / "vft.json").read_text())
    asked = {name: about[name] for name in state["asked"]}  # not streams, so the whole run asks what it began with
    assert asked["prompt"]
    rules = {"rules": VERSION, "step": STEPS, "asked": asked}
    assert state == {"cursor": cursor, "streams": {}, "samples": samples, "bad": [], **rules}


def test_more_epochs_train_on_every_sample_of_them(world: World, commands: Commands, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": {"max_samples_per_pack": 1},
        "train": {"max_steps": None, "epochs": 1, "packs_per_step": 3, "schedule": "constant"},
    }
    config = world.config(tmp_path / "run.toml", settings)
    folder = commands.train(config)
    assert column(folder, "samples") == [3, 1]  # the last step is filled up with empty packs
    commands.train(config, "train.epochs=2")
    assert column(folder, "samples") == [3, 1, 3, 1]
