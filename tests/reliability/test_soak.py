"""A run that is left alone for long, but for workers that die now and then: it needs no more at its end than before.

`--count` is in minutes. Without it the run is too short to tell a slope of memory from its warm-up, and only files are
judged.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed.launchers import Launcher, wait_for_step
from tests.runs.commands import CAPTION, Commands, column
from tests.runs.processes import descendants
from tests.runs.world import COLOURS, World, video_record

SHORT_S = 10.0
SAMPLED_EVERY_S = 2.0
KILLED_EVERY_S = (5.0, 15.0)
WARM_UP = 1 / 6
"""Of the time: caches fill, the allocator's arenas come to their size."""


@dataclass(frozen=True)
class Sample:
    """What a run holds at a moment."""

    time_s: float
    main_bytes: int
    """Memory of the training process, but for mapped files; pages that it shares count for each of their owners in part
    (PSS). Of mapped files, torch's libraries above all, its part grows when some other program that has them ends."""
    tree_bytes: int
    """The same with all processes that it started."""
    main_files: int
    """Open descriptors."""
    tree_files: int


def sample(pid: int) -> Sample:
    """Of the run whose training process is `pid`."""
    main_bytes, main_files = _memory_bytes(pid), _open_files(pid)
    others = [(_memory_bytes(one), _open_files(one)) for one in descendants(pid)]
    tree_bytes, tree_files = (sum(each) for each in zip((main_bytes, main_files), *others, strict=True))
    return Sample(time.monotonic(), main_bytes, tree_bytes, main_files, tree_files)


def _memory_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended since
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def workers(pid: int) -> set[int]:
    """Decoding workers are started by a server of their own: they are the grandchildren."""
    return {one for one, parent in descendants(pid).items() if parent != pid}


def trend_per_hour(times_s: list[float], values: list[int]) -> float:
    """Median of the slopes between all pairs of samples (Theil and Sen): kills and saves, which come and go, move it
    little."""
    first, second = np.triu_indices(len(values), 1)
    times, heights = np.array(times_s), np.array(values, dtype=float)
    return float(np.median((heights[second] - heights[first]) / (times[second] - times[first]))) * 3600


def many_clips(world: World, folder: Path, number: int) -> Path:
    """A folder of data with so many clips: one that was decoded while its worker was killed is not tried again."""
    folder.mkdir()
    records = []
    for i in range(number):
        colour = list(COLOURS)[i % len(COLOURS)]
        shutil.copy(world.root / f"{colour}.mp4", folder / f"{i}.mp4")
        records.append(video_record(colour) | {"id": str(i), "videos": [f"{i}.mp4"]})
    (folder / "videos.json").write_text(json.dumps(records))
    return folder


def test_memory_and_open_files_do_not_grow(
    world: World, commands: Commands, tmp_path: Path, count: Callable[[int], int]
) -> None:
    minutes = count(0)
    seconds, save, ask = (60.0 * minutes, 400, 600) if minutes else (SHORT_S, 8, 12)
    settings: dict[str, Any] = {
        "data": {
            "root": str(many_clips(world, tmp_path / "data", 100 + 6 * minutes)),
            "workers": 1,
            "max_bad_fraction": 1.0,
            "max_samples_per_pack": 2,
        },
        "lora": {"dropout": 0.1},
        "train": {"max_steps": 10**8, "learning_rate": 1e-5, "schedule": "constant"},
        "checkpoint": {"every_steps": save, "keep_last": 2},
        "eval": {"every_steps": ask, "max_samples": 4, "max_new_tokens": 4},
        "log": {"every_steps": ask},
    }
    config, folder = world.config(tmp_path / "run.toml", settings), tmp_path / "run"
    # Beside other work on the machine; and Ctrl-C shall reach it from wherever the tests were started.
    words = ["env", "--default-signal=INT", "nice", "-n", "19", "python", "-m", CAPTION, str(config)]
    with Launcher(words, commands.environment, tmp_path / "log") as launcher:
        wait_for_step(folder, 2, launcher.is_running)
        samples, kills = _watch(launcher, seconds)
        os.kill(launcher.pid, signal.SIGINT)
        assert launcher.wait(60) == 130, launcher.output()[-2000:]
    steps = max(column(folder, "step"))
    commands.run(CAPTION, config, f"train.max_steps={steps + 3}").ok()
    assert column(folder, "step")[-1] == steps + 3 and (folder / "report.html").exists()
    lost = len((folder / "quarantine.jsonl").read_text().splitlines())
    print(f"{seconds / 60:.1f} min, {steps} steps, {kills} workers killed, {lost} clips lost with them")
    assert kills >= seconds / 20
    assert not minutes or len(list((folder / "predictions").iterdir())) > 1
    _judge(samples, slope_limit=0.01 if minutes else None)


def _watch(launcher: Launcher, seconds: float) -> tuple[list[Sample], int]:
    """Samples, and the number of workers killed on the way."""
    pick, samples, seen, kills, begun = random.Random(0), [], set[int](), 0, time.monotonic()
    next_kill = begun + KILLED_EVERY_S[0]
    while time.monotonic() < begun + seconds:
        time.sleep(SAMPLED_EVERY_S)
        assert launcher.is_running(), launcher.output()[-2000:]
        samples.append(sample(launcher.pid))
        now = workers(launcher.pid)
        if time.monotonic() > next_kill and now & seen:  # it has started by now
            os.kill(min(now & seen), signal.SIGKILL)
            kills, next_kill = kills + 1, time.monotonic() + pick.uniform(*KILLED_EVERY_S)
        seen = now
    return samples, kills


def _judge(samples: list[Sample], slope_limit: float | None) -> None:
    """Print what was found; the test fails where it grows. `slope_limit`: of memory, as a share of it, an hour."""
    end, duration = samples[-1].time_s, samples[-1].time_s - samples[0].time_s
    warm = [one for one in samples if one.time_s >= end - (1 - WARM_UP) * duration]
    third, sixth, grown = len(warm) // 3, len(warm) // 6, []
    for name in ("main", "tree"):
        memory, files = ([getattr(one, f"{name}_{what}") for one in warm] for what in ("bytes", "files"))
        size, first, last = (float(np.median(part)) for part in (memory, files[:third], files[-third:]))
        slope = trend_per_hour([one.time_s for one in warm], memory) / size
        course = [f"{np.median(memory[i * sixth : (i + 1) * sixth]) / 2**20:.1f}" for i in range(6) if sixth]
        print(f"{name}: {size / 2**20:.1f} MiB, {slope:+.2%} an hour; in sixths of the time {' '.join(course)}")
        print(
            f"{name}: open files {min(files)}-{max(files)}, median {first:g} in the first third, {last:g} in the last"
        )
        if slope_limit is not None and slope >= slope_limit:
            grown.append(f"{name}: memory")
        if last > first + (20 if slope_limit is None else 2):  # few samples tell little: packs ahead hold files too
            grown.append(f"{name}: open files")
    assert not grown
