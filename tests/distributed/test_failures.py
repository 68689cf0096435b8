"""A process that dies, stops, never comes or runs other code is named, and nobody waits for it for ever."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import Store  # type: ignore[attr-defined]

from tests.distributed.launchers import Launcher, ended, ours, rank_processes, wait_for_step
from tests.runs.commands import CAPTION, REPOSITORY, Command, Commands, column, metrics
from tests.runs.processes import free_port
from tests.runs.world import World
from vft.distributed.heartbeat import SUSPICIOUS_SILENCE_S, Heartbeat, Member

HOST = socket.gethostname()
DISTURBED = str(Path(__file__).with_name("disturbed.py"))
ENDLESS: dict[str, Any] = {
    "train": {"max_steps": 100_000},
    "parallel": {"silence_s": 3.0, "timeout_s": 20.0},
}


def start(
    commands: Commands,
    config: Path,
    ranks: list[int],
    size: int,
    *overrides: str,
    program: str = CAPTION,
    port: str = "",
    **more: str,
) -> list[Command]:
    """Processes of one run, without a launcher that would end the others."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port or free_port(), "WORLD_SIZE": str(size)}
    return [
        commands.start(program, config, *overrides, RANK=str(r), LOCAL_RANK=str(r), **address, **more) for r in ranks
    ]


def ends_within(command: Command, seconds: float) -> tuple[int, list[str]]:
    """Its status and our lines; the test fails where it goes on for longer."""
    result = ended(command, seconds)
    assert "Traceback" not in result.stderr, result.stderr
    return result.status, ours(result.stderr)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_is_named(
    world: World, commands: Commands, tmp_path: Path, how: signal.Signals, victim: int
) -> None:
    config = world.config(tmp_path / "run.toml", ENDLESS)
    started = start(commands, config, [0, 1], 2)
    wait_for_step(tmp_path / "run", 3, lambda: all(one.is_running for one in started))
    time.sleep(2)  # a sign of life a second says what it does
    os.kill(started[victim].pid, how)
    try:
        status, lines = ends_within(started[1 - victim], 30)
    finally:
        if started[victim].is_running:
            started[victim].kill()
    assert status == 1
    (line,) = lines
    # The first process keeps the store here: without it nobody can read what it did last.
    said = "no sign of life for" if victim else "can't be reached from here"
    assert line.startswith(f"error: host {HOST} (rank {victim})") and said in line
    assert victim == 0 or "was at step" in line


class Unreachable(Store):
    """Of a process that was killed."""

    def set(self, *_: object) -> None:
        raise RuntimeError("Broken pipe")


def test_the_store_itself_may_be_what_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main thread leaves the others time to find out, and to end the process: its own words say less."""
    waited: list[float] = []
    monkeypatch.setattr("vft.distributed.heartbeat.time.sleep", waited.append)
    known = {rank: Member(rank, 0, HOST, "", "", "", "", 0) for rank in (0, 1)}
    Heartbeat(Unreachable(), 1, 2, known, silence_s=60.0, timeout_s=600.0).find_cause()
    assert sum(waited) >= SUSPICIOUS_SILENCE_S


def test_a_process_that_hangs_is_named(world: World, commands: Commands, tmp_path: Path) -> None:
    """It is alive, and its thread says so, but it never comes back from reading."""
    config = world.config(tmp_path / "run.toml", ENDLESS, {"parallel": {"silence_s": 60.0, "timeout_s": 4.0}})
    port = free_port()
    (first,) = start(commands, config, [0], 2, port=port)
    (second,) = start(commands, config, [1], 2, program=DISTURBED, port=port, HANGS="step")
    try:
        status, lines = ends_within(first, 60)
    finally:
        if second.is_running:
            second.kill()
    assert status == 1 and len(lines) == 1
    assert lines[0].startswith(f"error: host {HOST} (rank 1) holds up the others: at step 3, waiting for data")
    assert "parallel.timeout_s = 4 s" in lines[0]


@pytest.mark.parametrize("beside", [{"asynchronous": True}, {"asynchronous": False}], ids=["beside", "in_the_loop"])
def test_writing_may_take_longer_than_any_time_out(
    world: World, commands: Commands, tmp_path: Path, beside: dict[str, bool]
) -> None:
    settings = {"train": {"max_steps": 2}, "parallel": {"silence_s": 2.0, "timeout_s": 3.0}}
    config = world.config(tmp_path / "run.toml", ENDLESS, settings, {"checkpoint": {"every_steps": 1, **beside}})
    for one in start(commands, config, [0, 1], 2, program=DISTURBED, HANGS="write"):
        status, lines = ends_within(one, 90)
        assert (status, lines) == (0, [])
    assert column(tmp_path / "run", "step") == [1, 2]


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (0, "error: 1 of 2 processes didn't come within 2 s: rank 1 (host number 1)"),
        (1, "rank 1 can't reach the rendezvous at 127.0.0.1:"),
    ],
)
def test_a_process_that_never_comes(world: World, commands: Commands, tmp_path: Path, here: int, message: str) -> None:
    config = world.config(tmp_path / "run.toml", ENDLESS)
    (one,) = start(commands, config, [here], 2, "parallel.timeout_s=2", LOCAL_WORLD_SIZE="1")
    status, lines = ends_within(one, 30)
    assert status == 2
    assert len(lines) == 1 and message in lines[0]


def test_a_mistake_on_one_process_ends_all(world: World, commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = world.config(tmp_path / "run.toml", ENDLESS)
    port, wrong = free_port(), f"output_dir={tmp_path}/file/run"
    started = [*start(commands, config, [0], 2, port=port), *start(commands, config, [1], 2, wrong, port=port)]
    (first, (line,)), (second, _) = (ends_within(one, 30) for one in started)
    assert (first, second) == (1, 2)
    assert line.startswith(f"stopped: host {HOST} (rank 1): output_dir = ")


def test_other_code_on_another_host(world: World, commands: Commands, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "vft", tmp_path / "other" / "vft", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "vft" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    config = world.config(tmp_path / "run.toml", ENDLESS)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    started = []
    for rank, folder in enumerate((REPOSITORY, tmp_path / "other")):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(folder)}
        words = ["python", "-m", CAPTION, str(config)]
        started.append(Launcher(words, commands.environment | address | place, tmp_path / f"{rank}", folder))
    assert [one.wait(timeout=120) for one in started] == [2, 1], [one.output() for one in started]
    (line,) = ours(started[0].output())
    assert line.startswith("error: vft's own files (a digest): ")
    assert f"on host {HOST} (rank 0), " in line and f"on host {HOST} (rank 1)" in line


STOCHASTIC: dict[str, Any] = {
    "lora": {"dropout": 0.1},
    "train": {"max_steps": 30, "packs_per_step": 4},
    "data": {"max_samples_per_pack": 1},
    "checkpoint": {"every_steps": 5},
    "parallel": {"silence_s": 5.0, "timeout_s": 60.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_run_again(
    world: World, commands: Commands, tmp_path: Path, how: signal.Signals, victim: int
) -> None:
    undisturbed = world.config(tmp_path / "undisturbed.toml", STOCHASTIC)
    commands.torchrun(2, undisturbed).ok()
    config = world.config(tmp_path / "run.toml", STOCHASTIC)
    folder = config.with_suffix("")
    words = commands.torchrun_words(2, config)
    words[3:3] = ["--max-restarts", "1"]
    with Launcher(words, commands.environment, tmp_path / "log") as launcher:
        wait_for_step(folder, 12, launcher.is_running)
        os.kill(rank_processes(launcher.pid)[victim], how)
        before = len(metrics(folder))
        assert launcher.wait(150) == 0, launcher.output()
    text = launcher.output()
    if how is signal.SIGSTOP:
        assert any(f"host {HOST} (rank {victim}): no sign of life" in line for line in ours(text)), text
    else:  # torchrun notices first, ends the others and says whom it was
        assert f"local_rank: {victim}" in text and "exitcode: -9" in text
    (resumed,) = (line for line in text.splitlines() if "going on from" in line)
    assert int(resumed.rpartition("-")[2]) >= before - before % 5 - 5
    assert column(folder, "loss") == column(undisturbed.with_suffix(""), "loss")
