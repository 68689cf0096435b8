"""The benchmarks of data, loading and checkpoints, on the smallest sizes: their tables and counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.commands import Commands
from tests.runs.fixtures import commands as commands

BENCH = Path(__file__).parents[3] / "tools/bench"


def figures(commands: Commands, name: str, output: Path, *arguments: object) -> dict[str, Any]:
    done = commands.run(str(BENCH / name), *arguments, "--output", output).ok()
    made: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    assert made["environment"]["cpus"] > 0 and made["title"] in " ".join(done.stdout.split()) and made["settings"]
    return made


def test_data(commands: Commands, tmp_path: Path) -> None:
    sizes = ("--sizes", "64x56", "--seconds", "1", "--fps", "8", "--max-frames", "8", "--max-pixels", "3136")
    # The usual processor is left out: to import what it needs takes longer than all the rest.
    few = ("--count", "2", "--samples", "4", "--repeats", "2", "--cores", "1", "--without-processor")
    rows = figures(commands, "data.py", tmp_path / "data.json", *sizes, *few)["rows"]
    assert [(row["clips"], row["cores"], row["side"]) for row in rows] == [
        ("64x56, 8 fps", 1, "vft"),
        ("64x56, 8 fps", 1, "torchcodec"),
    ]
    assert {row["frames"] for row in rows} == {4 * 8}
    for row in rows:
        assert row["frames/s"] == pytest.approx(8 * row["samples/s"]) and row["frames/s"] > 0
        assert row["frames/CPU s"] > 0
    assert rows[1]["of bare"] == 1 and 0 < rows[0]["of bare"] < 5


def test_load(commands: Commands, tmp_path: Path) -> None:
    made = figures(commands, "load.py", tmp_path / "load.json", "--shape", "tiny", "--repeats", "1", "--device", "cpu")
    rows = {row["way"]: row for row in made["rows"]}
    assert list(rows) == ["vft", "safetensors, copied", "transformers"]
    sizes = [row["model GiB"] * 2**30 for row in rows.values()]
    assert max(sizes) - min(sizes) < 4096 and made["file_bytes"] == pytest.approx(sizes[0], rel=0.05)
    for row in rows.values():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"] < 60 and row["GiB/s"] > 0
    assert rows["vft"]["time / vft's"] == 1


def test_checkpoint(commands: Commands, tmp_path: Path) -> None:
    few = ("--shape", "tiny", "--ranks", "4", "--full", "--repeats", "1", "--device", "cpu", "--folder", tmp_path)
    made = figures(commands, "checkpoint.py", tmp_path / "checkpoint.json", *few, "--steps", "2", "--tokens", "32")
    lora, full = made["rows"]
    assert (lora["trained"], full["trained"]) == ("LoRA rank 4", "full")
    for row in (lora, full):
        # Three float32 values a parameter: itself and two moments.
        assert row["MiB"] * 2**20 == pytest.approx(12 * row["parameters"], rel=0.2)
        parts = row["copy and write, s"] + row["hash, s"] + row["flush, s"]
        assert parts == pytest.approx(row["save, s"]) and min(row["hash, s"], row["flush, s"], row["load, s"]) > 0
    assert full["parameters"] > lora["parameters"] > 0
    kinds = ("none", "in the loop", "beside the loop")
    assert [(row["trained"], row["saves"]) for row in made["stalls"]] == [
        (t, k) for t in ("LoRA rank 4", "full") for k in kinds
    ]
    for row in made["stalls"]:
        assert (row["stall, s"] == 0) == (row["saves"] == "none") and row["stall, s"] < row["between saves, s"]
    assert not list(tmp_path.glob("vft-bench-*"))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("data.py", ("--sizes", "640"), "--sizes 640: must be WIDTHxHEIGHT"),
        ("load.py", ("--model", "/no/such/folder"), "no safetensors files"),
        ("checkpoint.py", ("--ranks", "0"), "--ranks 0: must be at least 1"),
    ],
)
def test_mistakes(commands: Commands, name: str, arguments: tuple[str, ...], message: str) -> None:
    assert message in commands.run(str(BENCH / name), *arguments).error
