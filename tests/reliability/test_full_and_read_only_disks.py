"""Every kind of write on a disk that is full or read-only: one line, exit status 2, and what was there stays whole.

Disks of a few megabytes are mounted for it, which takes root. tests/runs/test_full_disk.py has a checkpoint that
doesn't fit, and files that may not grow, which takes none.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.full_disk import fill
from tests.runs.commands import CAPTION, Commands, metrics
from tests.runs.world import World, record, video_record
from vft.training.checkpoint import find_damage, list_checkpoints

SCRIPT = str(Path(__file__).with_name("full_disk.py"))
OFTEN: dict[str, Any] = {
    "train": {"max_steps": 8, "schedule": "constant"},
    "checkpoint": {"every_steps": 2},
    "eval": {"every_steps": 4, "at_start": False, "max_new_tokens": 2, "batch_size": 4},
}

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a disk of some megabytes; called with a folder of such a disk and `"ro"`, makes it read-only."""
    mounted: list[Path] = []

    def run(*words: object) -> bool:
        return os.geteuid() == 0 and subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0

    def mount(name: str = "disk", options: str = "size=4m") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        if options == "ro":
            assert run("-o", "remount,ro", folder)
            return folder
        if not run("-t", "tmpfs", "-o", options, "tmpfs", folder):
            pytest.skip("a disk can't be mounted here: it takes root, and the right to mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ------------------------------------------------------------------------------------------------------------ in a run


@pytest.fixture(scope="module")
def whole(world: World, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on a disk with room."""
    return commands.train(config_of(world, tmp_path_factory.mktemp("whole") / "run.toml"))


def config_of(world: World, path: Path, **settings: Any) -> Path:
    """Four good clips and a record that can't be used."""
    records = [*map(video_record, ("red", "green", "blue", "yellow")), record("<video>?", None, videos=["red.mp4"])]
    file = world.root / "one_bad.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    data = {"data": {"sources": [{"format": "messages", "path": file.name}], "max_bad_fraction": 0.5}}
    return world.config(path, OFTEN, data, settings)


PLACES = {
    "start": (1, "config.toml", 0),
    "quarantine": (1, "quarantine.jsonl", 0),
    "metrics": (1, "metrics.jsonl", 0),  # later lines fit in the page that the file has
    "checkpoint": (3, "checkpoints", 4),
    "predictions": (1, "predictions/step-000004.jsonl", 4),
    "export": (1, "adapter", 8),
    "card": (1, "adapter/README.md", 8),
    "report": (1, "report.html", 8),
}
"""Where the disk is full from which call on, what the line names, and at least which checkpoint there is."""
QUICK = ("metrics", "checkpoint", "export")


@pytest.mark.parametrize(
    "where", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PLACES]
)
def test_a_disk_that_fills_up(
    world: World, commands: Commands, tmp_path: Path, whole: Path, mount: Mount, where: str
) -> None:
    disk = mount()
    run, (number, named, least) = disk / "run", PLACES[where]
    # Beside the loop a save would be in flight while predictions are written, and could meet the full disk first.
    beside = {"checkpoint": {"asynchronous": where != "predictions"}}
    config = config_of(world, tmp_path / "run.toml", output_dir=str(run), **beside)
    result = commands.run(SCRIPT, config, FILL=str(disk), WHERE=where, FROM=str(number))
    error = result.error
    assert str(run / named) in error and ("No space left" in error or "free space" in error), error
    good = list_checkpoints(run / "checkpoints")
    assert all(find_damage(folder) is None for folder in good)
    assert not good or int(good[0].name.removeprefix("step-")) >= least
    assert least == 0 or good
    assert not [path for path in run.rglob(".partial-*") if path.is_dir()]
    (disk / "filler").unlink()
    commands.run(CAPTION, config).ok()  # now there is room
    assert [line.get("loss") for line in metrics(run)] == [line.get("loss") for line in metrics(whole)]
    assert {path.name for path in run.iterdir()} >= {path.name for path in whole.iterdir()}
    print(f"{where}: {error.rpartition(': ')[2]}; went on from {good[0].name if good else 'the start'}, same losses")


# ------------------------------------------------------------------------------------------------------ what is written


def commands_that_write(world: World, learned: Path, target: Path, config: Path) -> dict[str, tuple[object, ...]]:
    """A command for each kind of output, written to `target`."""
    adapter = ("--adapter", learned / "adapter")
    return {
        "run": (CAPTION, config, f"output_dir={target}"),
        "cache": (CAPTION, config, f"data.cache_dir={target}"),
        "merge": ("tools/merge_lora.py", "--base", world.base, *adapter, "--output", target / "merged"),
        "inspect": ("tools/inspect_batch.py", config, "--output", target / "look"),
        "evaluate": ("tools/evaluate.py", config, *adapter, "--output", target / "answers"),
        "compare": ("tools/compare.py", learned, "--html", target / "page.html"),
    }


KINDS = ("run", "cache", "merge", "inspect", "evaluate", "compare")


@pytest.mark.parametrize("state", ["full", pytest.param("read-only", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_takes_nothing(
    world: World, commands: Commands, learned: Path, tmp_path: Path, mount: Mount, kind: str, state: str
) -> None:
    target = mount()
    (target / "mine").write_text("mine")
    if state == "full":
        fill(target)
    else:
        mount(options="ro")
    before = sorted(target.rglob("*"))
    config = world.config(tmp_path / "run.toml", {"train": {"max_steps": 1}})
    error = commands.run(*commands_that_write(world, learned, target, config)[kind]).error
    assert str(target) in error and any(word in error for word in ("space", "Read-only", "be written")), error
    left = {path for path in target.rglob("*") if path not in before and path.is_file() and path.stat().st_size}
    assert not left and (target / "mine").read_text() == "mine", left
    print(f"{kind}, {state}: {error}")
