"""Runs that are killed again and again, whatever they do at that moment, come to what a run comes to in peace.

`--count` is the number of kills in all. A run is killed and started again by the same command until it is through;
then the next one begins, until there were kills enough.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launchers import Launcher, rank_processes
from tests.runs.commands import CAPTION, Command, Commands
from tests.runs.processes import free_port, run_together
from tests.runs.same import assert_same
from tests.runs.world import MIXED, World

SETTINGS: dict[str, Any] = {
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "train": {"warmup_steps": 3, "weight_decay": 0.01, "packs_per_step": 4},
    "checkpoint": {"every_steps": 1, "keep_last": 2},
    "eval": {"every_steps": 4, "max_new_tokens": 4, "best_metric": "loss"},
    "parallel": {"silence_s": 5.0, "timeout_s": 60.0},
}
"""Dropout, a schedule, epochs (of 9 packs) that end within a step (of 4), a save after each step, and evaluations."""
ROUNDS: list[dict[str, Any]] = [
    {},
    {"checkpoint": {"asynchronous": False}},
    {"data": {"workers": 1}},
]
"""What makes no difference, changed from run to run."""
SHARE_OF_TWO = 0.3
"""Of the kills, those of runs in two processes."""
SHARE_OF_TORCHRUN = 0.2
"""Of those, runs started by torchrun itself, which takes seconds."""
START_UP_S = 2.0
"""About what a run takes to its first step."""


class Forked:
    """A run whose processes are copies of one that has imported everything."""

    def __init__(self, commands: Commands, config: Path, processes: int) -> None:
        self.ranks: list[Command] = []
        size = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
        for rank in range(processes):
            place = {**size, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            self.ranks.append(commands.start(CAPTION, config, **place))

    def is_running(self) -> bool:
        """Whether none has ended."""
        return all(one.is_running for one in self.ranks)

    def kill(self, pick: random.Random) -> bool:
        """Kill all processes, in any order, at once or not quite; False where they had ended well before."""
        for one in pick.sample(self.ranks, len(self.ranks)):
            with suppress(ProcessLookupError):  # it may end of itself before the signal comes
                if one.is_running:
                    os.kill(one.pid, signal.SIGKILL)
            time.sleep(pick.choice([0.0, 0.2]))
        ends = [one.wait() for one in self.ranks]
        killed = any(end.status == -signal.SIGKILL for end in ends)
        assert killed or all(end.status == 0 for end in ends), [end.stderr[-2000:] for end in ends]
        return killed


class Torchrun:
    """A run started by torchrun, which ends the others where one is killed."""

    def __init__(self, commands: Commands, config: Path, processes: int) -> None:
        words = commands.torchrun_words(processes, config)
        self.launcher = Launcher(words, commands.environment, config.with_suffix(".log"))
        self.is_running = self.launcher.is_running
        while self.is_running() and len(rank_processes(self.launcher.pid)) < processes:
            time.sleep(0.05)

    def kill(self, pick: random.Random) -> bool:
        """Kill one of its processes; False where they had ended well before."""
        with self.launcher:
            ranks = rank_processes(self.launcher.pid)
            if ranks:
                with suppress(ProcessLookupError):  # as above
                    os.kill(pick.choice(list(ranks.values())), signal.SIGKILL)
            return self.launcher.wait(60) != 0


def progress(folder: Path) -> tuple[int, int]:
    """Which file metrics.jsonl is (a run that goes on begins by writing it anew), and its number of lines."""
    file = folder / "metrics.jsonl"
    return (file.stat().st_ino, file.read_bytes().count(b"\n")) if file.exists() else (0, 0)


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint lies there in part."""
    return any((folder / "checkpoints").glob(".partial-*"))


def kill_at_random(run: Forked | Torchrun, folder: Path, end: int, pick: random.Random) -> str | None:
    """Kill a run while it starts, or up to five lines (of `end`) later. Returns where that was; None: it had ended."""

    def wait_for(done: Callable[[], bool]) -> None:
        while run.is_running() and not done():
            time.sleep(0.002)

    before, _ = progress(folder)
    where = pick.choices(["start-up", "steps", "save"], [0.3, 0.3, 0.4])[0]
    if where == "start-up":
        until = time.monotonic() + pick.uniform(0, START_UP_S)
        wait_for(lambda: time.monotonic() > until)
        where = "start-up" if progress(folder)[0] == before else "steps"
    else:
        wait_for(lambda: progress(folder)[0] != before)
        goal = min(progress(folder)[1] + pick.randint(1, 5), end)
        wait_for(lambda: progress(folder)[1] >= goal)
        if where == "save":
            wait_for(lambda: is_saving(folder) or progress(folder)[1] > goal)
        time.sleep(pick.uniform(0, 0.02 if goal < end else 0.5))  # at the end come the exports and the report
    if not run.kill(pick):
        return None
    return "save" if is_saving(folder) else "steps" if where == "save" else where


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_killed_at_random_moments(
    world: World, commands: Commands, tmp_path: Path, count: Callable[[int], int], processes: int
) -> None:
    kills = round(count(4) * (SHARE_OF_TWO if processes == 2 else 1 - SHARE_OF_TWO))
    steps = 40 if kills > 5 else 8
    settings: Sequence[dict[str, Any]] = (MIXED, SETTINGS, {"train": {"max_steps": steps}})
    undisturbed = world.config(tmp_path / "undisturbed.toml", *settings)
    for result in run_together(commands, processes, CAPTION, undisturbed):
        result.ok()
    end, pick = progress(undisturbed.with_suffix(""))[1], random.Random(processes)
    killed: Counter[str] = Counter()
    rounds = starts = 0
    while killed.total() < kills:
        config = world.config(tmp_path / f"run{rounds}.toml", *settings, ROUNDS[rounds % len(ROUNDS)])
        rounds += 1
        where: str | None = ""
        while where is not None and killed.total() < kills:
            launched = processes > 1 and pick.random() < SHARE_OF_TORCHRUN and kills > 5
            run = (Torchrun if launched else Forked)(commands, config, processes)
            where = kill_at_random(run, config.with_suffix(""), end, pick)
            killed.update([] if where is None else [where])
            starts += launched
        if where is not None:
            for result in run_together(commands, processes, CAPTION, config):
                result.ok()
        assert_same(config.with_suffix(""), undisturbed.with_suffix(""), steps)
    print(
        f"{processes} process(es): {killed.total()} kills {dict(killed)}, {starts} by torchrun, {rounds} runs the same"
    )
