"""tools/bench/peer.py: both sides train the same model on the same samples, and its report says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peer
import pytest

from vft.common.errors import UserError

SCRIPT = Path(__file__).parents[3] / "tools" / "bench" / "peer.py"


def run(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--threads", "1", "--repeats", "1", *map(str, options)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Steps of two rows here and of batches of 3 and 1 there, whose answers differ in length: a mean of the batches'
    means would be another loss."""
    folder = tmp_path_factory.mktemp("peer")
    shape = ("--shape", "tiny", "--clips", 2, "--questions", 2, "--mixed", "--frames", 4, "--workers", 1)
    steps = ("--samples-per-step", 4, "--pack", 2, "--peer-batch", 3, "--steps", 1)
    done = run(folder, *shape, *steps, "--output", "peer.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "times the samples/s" in done.stdout
    content: dict[str, Any] = json.loads((folder / "peer.json").read_text())
    return content


def test_both_sides_train_alike(report: dict[str, Any]) -> None:
    steps = report["steps"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        ours, theirs = float(step["loss, vft"]), float(step["loss, peer"])
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert step["gradient norm, vft"] == pytest.approx(step["gradient norm, peer"], rel=1e-4)
    # Equal losses would mean little if the updates moved nothing.
    assert float(steps[-1]["loss, vft"]) < float(steps[0]["loss, vft"]) - 0.1
    assert report["largest_loss_difference"] == max(step["loss, relative difference"] for step in steps)


def test_rows_count_the_same_work(report: dict[str, Any]) -> None:
    ours, theirs = report["rows"]
    assert ours["samples"] == theirs["samples"] == 4
    assert ours["supervised tokens"] == theirs["supervised tokens"] == report["steps"][2]["supervised tokens"] > 0
    video = 4 // 2 * (224 // 28) ** 2
    # There each of the four questions has its video, here each of the two videos stands once; and there is padding.
    assert theirs["tokens"] - ours["tokens"] > 2 * video
    assert report["ratio"] == pytest.approx(ours["samples/s"] / theirs["samples/s"])
    for row in report["rows"]:
        assert row["samples/s"] == pytest.approx(4 / row["s a step"])
        assert 0 <= row["CPU s a step"] < 60  # 0: the one step passed between two looks
        assert 0.1 < row["peak GiB"] < 4
    assert report["settings"]["peer_batch"] == 3 and report["environment"]["threads"] == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--questions", 2, "--samples-per-step", 5], "--samples-per-step 5"),
        (["--steps", 0], "--steps 0"),
        (["--model", "missing"], "--model missing"),
    ],
)
def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[object], named: str
) -> None:
    sizes = ["--clips", 2, "--questions", 1, "--pack", 1, "--samples-per-step", 1]
    monkeypatch.setattr(sys, "argv", ["peer.py", *map(str, [*sizes, *options])])
    with pytest.raises(SystemExit) as ended:
        peer.main()
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1 and named in printed


def test_steps_of_other_samples_are_no_comparison() -> None:
    ours, theirs = (peer.Record([2.0], [1.0], [targets], [9], [4]) for targets in (7, 8))
    with pytest.raises(UserError, match=r"targets of the steps: \[7\] here, \[8\] there"):
        peer.compared(ours, theirs)
