"""Whole runs on streams that have nothing to train on, or nothing for long: they end by themselves and by signals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.streaming import clip, pe_pair, pe_shards
from tests.helpers.tars import write_tar
from tests.runs.commands import CAPTION, Commands, column, metrics
from tests.runs.processes import run_together
from tests.runs.test_streaming_runs import PE, TEXTS, settings, spools
from tests.runs.world import World, record


def write_bad(path: Path, count: int, first: tuple[str, ...] = ()) -> None:
    """Clips whose records have no caption, behind good ones of the names `first`."""
    pairs = [pe_pair(name) for name in first]
    pairs += [[(f"{i:04d}.mp4", clip()), (f"{i:04d}.json", b'{"duration": 2.0}')] for i in range(count)]
    write_tar(path, [member for pair in pairs for member in pair])


@pytest.mark.parametrize("processes", [1, 2])
def test_it_ends_by_itself(world: World, commands: Commands, tmp_path: Path, processes: int) -> None:
    """With the same cause in both processes, and as many bad clips in quarantine.jsonl as the line says."""
    for shard in range(2):
        write_bad(tmp_path / "data" / "pe" / f"{shard}.tar", 3)
    config = world.config(tmp_path / "run.toml", settings(tmp_path / "data", {"sources": [PE]}, packs_per_step=2))
    results = run_together(commands, processes, CAPTION, config)
    assert [result.status for result in results] == [2] * processes
    lines = [line for result in results for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(
        "error: pe: no clip met in 2 archive(s) can be trained on: 6 of 6 clips: no caption; the record has the keys "
    )
    assert "Traceback" not in "".join(result.stderr for result in results)
    folder = config.with_suffix("")
    assert len((folder / "quarantine.jsonl").read_text().splitlines()) == 6
    assert not (folder / "adapter").exists() and spools(commands) == []


def test_steps_are_over_before_there_was_anything(world: World, commands: Commands, tmp_path: Path) -> None:
    """Whatever share may be bad, weights that nothing was trained into are no result."""
    write_bad(tmp_path / "data" / "pe" / "0.tar", 60)
    config = world.config(tmp_path / "run.toml", settings(tmp_path / "data", {"sources": [PE]}, packs_per_step=1))
    result = commands.run(CAPTION, config, "train.max_steps=2")
    assert "pe: no clip met in 1 archive(s) can be trained on: 32 of 32 clips: no caption;" in result.error
    assert not (config.with_suffix("") / "adapter").exists()


def test_a_source_beside_it(world: World, commands: Commands, tmp_path: Path) -> None:
    """Training on the others would not be what was asked for."""
    root = tmp_path / "data"
    write_bad(root / "pe" / "0.tar", 5)
    lines = [{"id": f"t{i}", **record(f"What is {i}?", f"It is {i}.")} for i in range(9)]
    (root / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = world.config(tmp_path / "run.toml", settings(root, {"sources": [TEXTS, PE]}))
    assert (
        "pe: no clip met in 1 archive(s) can be trained on: 3 of 3 clips: no caption;"
        in commands.run(CAPTION, config).error
    )


def stretch(root: Path) -> dict[str, Any]:
    """A good clip, many bad ones, an empty archive and a damaged one."""
    write_bad(root / "pe" / "0.tar", 35, ("a", "b"))
    write_tar(root / "pe" / "1.tar", {})
    (root / "pe" / "2.tar").write_bytes(b"<html>404</html>")
    return {"sources": [PE], "max_samples_per_pack": 1}


def test_a_long_bad_stretch_is_told(world: World, commands: Commands, tmp_path: Path) -> None:
    """Rows without a document, and every archive that gave less than it should; the run goes on, also later."""
    config = world.config(
        tmp_path / "run.toml",
        settings(tmp_path / "data", stretch(tmp_path / "data"), packs_per_step=1, max_steps=8),
    )
    straight = commands.run(CAPTION, config).ok()
    told = [line for line in straight.stderr.splitlines() if line.startswith("warning: ")]
    assert sum("row 1 of this step stays empty, the last: 0.tar/" in line for line in told) >= 2
    assert len([line for line in told if "/1.tar: holds no files" in line]) == 1
    assert len([line for line in told if "/2.tar: " in line and "download it again" in line]) == 1
    folder = config.with_suffix("")
    samples = column(folder, "samples")
    assert set(samples) == {0, 1} and len(samples) == 8
    assert [loss is None for loss in column(folder, "loss")] == [count == 0 for count in samples]  # 0 would look good
    again = world.config(tmp_path / "again.toml", settings(tmp_path / "data", stretch(tmp_path / "data"), max_steps=8))
    for steps in (3, 8):
        commands.run(CAPTION, again, "train.packs_per_step=1", f"train.max_steps={steps}").ok()
    for key in ("sample_digest", "loss", "samples"):
        assert column(again.with_suffix(""), key) == column(folder, key), key


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_searches(world: World, commands: Commands, tmp_path: Path, number: signal.Signals) -> None:
    """With one good clip at the start and no other: the run stops when it is told to, and goes on where it stopped."""
    write_bad(tmp_path / "data" / "pe" / "0.tar", 900, ("a",))
    data = {"sources": [PE], "max_samples_per_pack": 1}
    config = world.config(tmp_path / "run.toml", settings(tmp_path / "data", data, packs_per_step=1, max_steps=100_000))
    folder, command = config.with_suffix(""), commands.start(CAPTION, config)
    while command.is_running and (not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 2):
        time.sleep(0.01)
    begun = time.monotonic()
    os.kill(command.pid, number)
    result = command.wait()
    assert time.monotonic() - begun < 20
    assert result.status == 128 + number, result.stderr[-2000:]
    assert "the same command goes on there" in result.stderr and spools(commands) == []
    assert (folder / "checkpoints" / f"step-{len(metrics(folder)):06d}").is_dir()


def test_inspection_of_a_stream_without_documents(world: World, commands: Commands, tmp_path: Path) -> None:
    """An empty row would look like data."""
    write_bad(tmp_path / "data" / "pe" / "0.tar", 4)
    config = world.config(tmp_path / "run.toml", settings(tmp_path / "data", {"sources": [PE]}))
    result = commands.run("tools/inspect_batch.py", config, "--output", tmp_path / "look")
    assert "pe: no clip met in 1 archive(s) can be trained on: 4 of 4 clips: no caption;" in result.error
    pe_shards(tmp_path / "data" / "good", [1])
    source = 'data.sources=[{format="pe_video", path="good", stream=true}]'
    commands.run("tools/inspect_batch.py", config, source, "--output", tmp_path / "look").ok()
