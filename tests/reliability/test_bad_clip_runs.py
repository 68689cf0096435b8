"""Runs with 1 %, 5 % and 50 % of their clips bad: the first two end well and the same way each time, the third stops.

Every other bad clip is refused by the index, the others only fail when they are decoded.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import CAPTION, TIMES, Commands, Result, metrics
from tests.runs.world import ANSWERS, PROMPT, World, damage, record

SETTINGS: dict[str, Any] = {
    "data": {"max_samples_per_pack": 1},
    "train": {"packs_per_step": 4, "schedule": "constant"},
}
ACROSS = [*ANSWERS]


def cut_off(path: Path) -> None:
    """Without the end, where the index of an MP4 file is."""
    path.write_bytes(path.read_bytes()[:600])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def web_page(path: Path) -> None:
    """What a server says instead of sending the clip."""
    path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")


EARLY: list[tuple[Callable[[Path], None], str]] = [
    (cut_off, "truncated"),
    (empty, "empty"),
    (web_page, "not_a_video"),
    (os.unlink, "missing"),
]


def make_clips(world: World, root: Path, count: int, bad: int) -> dict[str, str]:
    """`count` clips with a record each, of which `bad` are spoilt; the reason of each of these, by id."""
    root.mkdir()
    lines = []
    for number in range(count):
        colour = ACROSS[number % len(ACROSS)]
        shutil.copy(world.root / f"{colour}.mp4", root / f"{number:03d}.mp4")
        one = record(f"<video>{PROMPT}", ANSWERS[colour], videos=[f"{number:03d}.mp4"])
        lines.append(json.dumps({"id": f"{number:03d}", **one}) + "\n")
    (root / "clips.jsonl").write_text("".join(lines))
    reasons = {}
    for i, number in enumerate(random.Random(0).sample(range(count), bad)):
        spoil, reason = (damage, "decode_error") if i % 2 == 0 else EARLY[i // 2 % len(EARLY)]
        spoil(root / f"{number:03d}.mp4")
        reasons[f"{number:03d}"] = reason
    return reasons


def run(commands: Commands, world: World, root: Path, name: str, epochs: int, *overrides: str) -> tuple[Path, Result]:
    """A run with a cache and a folder of its own."""
    source = {"format": "messages", "path": "clips.jsonl"}
    own = {"data": {"root": str(root), "cache_dir": str(root.parent / f"cache_{name}"), "sources": [source]}}
    config = world.config(root.parent / f"{name}.toml", SETTINGS, own, {"train": {"max_steps": None, "epochs": epochs}})
    return config.with_suffix(""), commands.run(CAPTION, config, *overrides)


def left_by(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """What two equal runs have in common: the quarantine to the byte, and the metrics but for times and memory."""
    lines = [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(folder)]
    return (folder / "quarantine.jsonl").read_text(), lines


@pytest.mark.parametrize(("percent", "limits"), [(1, []), (5, ["data.max_bad_fraction=0.06"])])
def test_a_few_bad_clips(
    world: World,
    commands: Commands,
    tmp_path: Path,
    count: Callable[[int], int],
    percent: int,
    limits: list[str],
) -> None:
    """1 % is below the default of `data.max_bad_fraction`, for 5 % it is set."""
    # Below 100 clips 1 % is no clip: there the default stands against the smallest share there can be.
    clips, epochs = count(50 if percent == 1 else 40), 1 if percent == 1 else 2
    spoilt = max(1, clips * percent // 100)
    reasons = make_clips(world, tmp_path / "data", clips, spoilt)
    start = time.monotonic()
    found = []
    for name, workers in (("first", 1), ("second", 0)):
        folder, result = run(commands, world, tmp_path / "data", name, epochs, f"data.workers={workers}", *limits)
        result.ok()
        found.append(left_by(folder))
    assert found[0] == found[1]
    quarantine, lines = found[0]
    bad = [json.loads(line) for line in quarantine.splitlines()]
    assert {item["id"]: item["reason"] for item in bad} == reasons
    for item in bad:
        assert list(item) == ["id", "path", "reason", "message"]
        assert item["path"] == str(tmp_path / "data" / f"{item['id']}.mp4") and item["path"] in item["message"]
    # What fails in decoding keeps its place in the row, where another clip stands in for it.
    refused = sum(reason != "decode_error" for reason in reasons.values())
    assert sum(line["samples"] for line in lines) == epochs * (clips - refused)
    print(
        f"{spoilt} of {clips} clips bad ({dict(Counter(reasons.values()))}): two runs of {len(lines)} steps, equal "
        f"quarantine.jsonl and metrics, {time.monotonic() - start:.0f} s"
    )


def test_half_of_the_clips_bad(world: World, commands: Commands, tmp_path: Path, count: Callable[[int], int]) -> None:
    """The index alone finds too many; where it finds none, decoding soon does."""
    clips = count(40)
    make_clips(world, tmp_path / "data", clips, clips // 2)
    _, result = run(commands, world, tmp_path / "data", "indexed", 1)
    assert f"[{clips // 4} of {clips} samples can't be used (" in result.error
    assert "more than data.max_bad_fraction = 0.02]" in result.error and str(tmp_path / "data") in result.error
    assert not (tmp_path / "indexed").exists()
    print(f"{clips // 2} of {clips} clips bad: {result.error}")

    # With a limit that lets pass what the index refuses, the clips that fail in decoding go beyond it.
    folder, result = run(commands, world, tmp_path / "data", "decoded", 1, "data.max_bad_fraction=0.3")
    found = re.search(
        r"\[(\d+) of (\d+) samples can't be used \((.*)\), more than data.max_bad_fraction = 0.3\]", result.error
    )
    assert found is not None, result.error
    assert 0.3 < int(found[1]) / clips <= 0.5 and int(found[2]) == clips and "decode_error" in found[3]
    assert len((folder / "quarantine.jsonl").read_text().splitlines()) == int(found[1])
    assert not (folder / "adapter").exists()
    print(f"let pass by the index, stopped after {len(metrics(folder))} steps: {result.error}")
