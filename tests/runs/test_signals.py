"""Ctrl-C, SIGTERM and SIGUSR1: what is done is saved, the run ends, and goes on as if nothing had happened."""

from __future__ import annotations

import fcntl
import os
import random
import re
import signal
import struct
import termios
import time
from pathlib import Path

import pytest

from tests.runs.commands import CAPTION, Command, Commands, Result, metrics
from tests.runs.test_resume import STEPS, STOCHASTIC, assert_same, undisturbed, wait_for_step
from tests.runs.world import World
from vft.cli import live
from vft.reporting.progress import RunState

__all__ = ["undisturbed"]
SCRIPT = str(Path(__file__).with_name("interrupted.py"))
SCORED = {"eval": {"every_steps": 2, "at_start": False, "max_new_tokens": 8}}


def signalled(command: Command, number: int, seconds: float = 20.0) -> Result:
    """How it ends within so many seconds after a signal."""
    os.kill(command.pid, number)
    end = time.monotonic() + seconds
    while command.is_running:
        if time.monotonic() > end:
            command.kill()
            pytest.fail(f"still running {seconds:g} s after signal {number}")
        time.sleep(0.02)
    result = command.wait()
    assert "Traceback" not in result.stderr, result.stderr[-3000:]
    return result


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def paused(commands: Commands, config: Path, folder: Path, where: str) -> Command:
    """A run that has come to the place of tests/runs/interrupted.py."""
    command = commands.start(SCRIPT, config, PAUSE=where, PAUSED=str(folder))
    end = time.monotonic() + 60
    while not (folder / "paused").exists():
        assert command.is_running and time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.2)
    return command


def test_a_run_that_is_stopped_goes_on_bit_for_bit(
    world: World, commands: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    config = world.config(tmp_path / "run.toml", STOCHASTIC, {"checkpoint": {"every_steps": 0}})
    folder, pick = config.with_suffix(""), random.Random(7)
    for number, latest in ((signal.SIGINT, 3), (signal.SIGTERM, 6), (signal.SIGUSR1, 9)):
        command = commands.start(CAPTION, config)
        wait_for_step(folder, pick.randint(latest - 2, latest), lambda command=command: command.is_running)
        result = signalled(command, number)
        assert result.status == 128 + number
        done = metrics(folder)[-1]["step"]
        name = signal.Signals(number).name
        assert live.ending(RunState("", 0), folder) == f"stopped by {name}; the same command goes on"
        assert checkpoints(folder)[-1] == f"step-{done:06d}"
        said = [line for line in result.stderr.splitlines() if line.startswith(name)]
        assert said == [
            f"{name}: stopping after this step with a checkpoint; once more to leave at once",
            f"{name}: stopped after step {done}; the same command goes on there",
        ]
    commands.train(config, "checkpoint.every_steps=3")
    assert_same(folder, undisturbed, STEPS)


@pytest.mark.parametrize("where", ["answers", pytest.param("losses", marks=pytest.mark.slow)])
def test_stopped_in_the_middle_of_an_evaluation(world: World, commands: Commands, tmp_path: Path, where: str) -> None:
    undisturbed = commands.train(world.config(tmp_path / "undisturbed.toml", STOCHASTIC, SCORED, {"seed": 3}))
    config = world.config(tmp_path / "run.toml", STOCHASTIC, SCORED, {"seed": 3})
    folder = config.with_suffix("")
    assert signalled(paused(commands, config, tmp_path, where), signal.SIGTERM).status == 128 + signal.SIGTERM
    assert checkpoints(folder) == ["step-000002"] and not (folder / "predictions").exists()
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    commands.train(config)
    assert_same(folder, undisturbed, STEPS)


@pytest.mark.parametrize("where", ["start", "deaf"])
def test_stopped_before_the_first_step(world: World, commands: Commands, tmp_path: Path, where: str) -> None:
    command = paused(commands, world.config(tmp_path / "run.toml"), tmp_path, where)
    result = signalled(command, signal.SIGTERM)
    assert result.status == 128 + signal.SIGTERM
    assert result.stderr.splitlines()[-1] == "stopped by SIGTERM, with nothing to save; the same command goes on"
    assert checkpoints(tmp_path / "run") == []


def test_a_second_signal_leaves_at_once(world: World, commands: Commands, tmp_path: Path) -> None:
    config = world.config(tmp_path / "run.toml", {"checkpoint": {"every_steps": 1}})
    command = paused(commands, config, tmp_path, "write")
    os.kill(command.pid, signal.SIGTERM)
    time.sleep(1)
    assert command.is_running  # it waits for the checkpoint
    since = time.monotonic()
    assert signalled(command, signal.SIGTERM).status == 128 + signal.SIGTERM
    assert time.monotonic() - since < 2
    assert checkpoints(tmp_path / "run") == [".partial-step-000001"]


@pytest.mark.parametrize("size", [(8, 40), (30, 100)], ids=["small", "large"])
def test_ctrl_c_on_a_terminal(world: World, commands: Commands, tmp_path: Path, size: tuple[int, int]) -> None:
    """The live view is up; the terminal is left as it was."""
    settings = {"train": {"max_steps": 100_000}, "checkpoint": {"every_steps": 0}}
    config = world.config(tmp_path / "run.toml", STOCHASTIC, settings)
    (tmp_path / "program.py").write_text(ON_TERMINAL)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    program, terminal = str(tmp_path / "program.py"), os.ttyname(theirs)
    command = commands.start(program, config, TERM="xterm", TERMINAL=terminal)
    said, end = bytearray(), time.monotonic() + 120
    while chunk := read(ours):  # whoever doesn't read makes the run wait
        if time.monotonic() > end:
            command.kill()
            pytest.fail(f"still running after 120 s: {said.decode(errors='replace')[-3000:]}")
        if not said:
            os.close(theirs)
        said += chunk
        if re.search(rb"step ([3-9]|\d\d+)/", said) and b"\x03" not in said:
            os.write(ours, b"\x03")
            said += b"\x03"
    os.close(ours)
    text = said.decode()
    assert command.wait().status == 128 + signal.SIGINT, text[-3000:]
    assert "Traceback" not in text and "\x1b[1A" in text and "loss" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > 0
    done = metrics(tmp_path / "run")[-1]["step"]
    assert checkpoints(tmp_path / "run") == [f"step-{done:06d}"]
    assert f"SIGINT: stopped after step {done}" in text and "once more to leave at once" in text


ON_TERMINAL = """
import os
from vft.recipes.main import main

terminal = os.open(os.environ["TERMINAL"], os.O_RDWR)  # the first one that a session opens becomes its own
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
if __name__ == "__main__":
    main("caption")
"""


def read(terminal: int) -> bytes:
    """What has been written to a terminal; nothing when nobody has it open any more."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
