"""`tools/bench/device.py` runs all its parts, on the pretend device at tiny sizes, and finds what is wrong there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DEVICE = Path(__file__).parents[2] / "tools/bench/device.py"
ALL = {
    *(
        "versions",
        "kernel",
        "recurrence",
        "decoding",
        "demo",
        "same",
        "processes",
        "saves",
        "step-none",
        "step-mlp",
        "step-full",
    ),
    *("step-nf4", "text", "fragmentation", "generation"),
}


def run(folder: Path, *options: str, launch: str = "") -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The command with the pretend device, and what it wrote."""
    pretend = f"{sys.executable} -m tests.accelerator.on_pretend {launch}"
    words = [sys.executable, DEVICE, "--folder", folder, "--size", "tiny", "--eager", "--launch", pretend, *options]
    done = subprocess.run(words, cwd=DEVICE.parents[2], capture_output=True, text=True, check=False)
    return done, json.loads((folder / "device.json").read_text(encoding="utf-8"))


def test_a_step_holds(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--only", "step-none", launch="--kernel exact")
    assert done.returncode == 0, done.stdout[-4000:]
    (row,) = found["step-none"]["rows"]
    assert row["what"] == "none, eager, 1 a video" and row["tokens/s"] > 0 and row["planned GiB"] > 0
    assert row["waits"] == row["recompiled"] == 0 and row["wrong"] == ""


@pytest.mark.slow
def test_a_kernel_of_nan_is_found(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--only", "kernel", launch="--kernel nan")
    assert done.returncode == 1
    trial, *_ = found["kernel"]["rows"]
    assert "gives other results" in trial["wrong"]
    assert "this device" in done.stdout and "gives other results" in done.stdout


@pytest.mark.slow
def test_every_part_holds(tmp_path: Path) -> None:
    done, found = run(tmp_path, launch="--kernel exact")
    assert done.returncode == 0, done.stdout[-8000:]
    assert set(found) == ALL and all(part["rows"] and part["ended"] for part in found.values())
    _, again = run(tmp_path, launch="--kernel exact")  # finished parts are kept
    assert again == found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "part", "trouble"),
    [
        ("save_without_synchronize", "saves", "tensors that are not those of their step"),
        ("pinned_buffer_reused", "same", "pinned memory was changed before its copy"),
        ("stride_0_pin", "step-none", "single memory location"),
    ],
)
def test_a_fault_is_found(tmp_path: Path, fault: str, part: str, trouble: str) -> None:
    done, found = run(tmp_path, "--only", part, launch=f"--kernel exact --plant {fault}")
    assert done.returncode == 1 and trouble in json.dumps(found[part])


@pytest.mark.slow
def test_a_part_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--only", "same", "--limit", "3", launch="--kernel exact")
    assert done.returncode == 1 and not found["same"]["ended"]
    assert "ended after 3 s, its limit" in found["same"]["rows"][-1]["wrong"]


def test_without_an_accelerator_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, DEVICE, "--folder", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "error: no accelerator" in done.stderr
