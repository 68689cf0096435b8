"""The benchmarks of a step, on the smallest size: what they count, and that they compare like with like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.runs.commands import Commands
from tests.runs.fixtures import commands as commands
from vft.models.attention import blocks_plan
from vft.models.layers import VisionAttention

BENCH = Path(__file__).parents[3] / "tools/bench"


def rows_of(commands: Commands, name: str, output: Path, *arguments: object) -> list[dict[str, Any]]:
    commands.run(str(BENCH / name), *arguments, "--output", output).ok()
    rows: list[dict[str, Any]] = json.loads(output.read_text(encoding="utf-8"))["rows"]
    return rows


def test_step(commands: Commands, tmp_path: Path) -> None:
    what = ("--shape", "tiny", "--tokens", "400", "--repeats", "1", "--questions", "3")
    rows = rows_of(commands, "step.py", tmp_path / "step.json", *what, "--modes", "none", "mlp", "full")
    assert [row["checkpointing"] for row in rows] == ["none", "mlp", "full"]
    assert {row["tokens"] for row in rows} == {400}
    planned = [row["planned GiB"] for row in rows]
    assert planned == sorted(planned, reverse=True) and planned[0] > planned[-1]
    for row in rows:
        assert row["tokens/s"] == pytest.approx(row["tokens"] / row["step s"]) and row["TFLOP/s"] > 0


def test_scaling(commands: Commands, tmp_path: Path) -> None:
    rows = rows_of(
        commands, "scaling.py", tmp_path / "scaling.json", "--shape", "tiny", "--repeats", "1", "--of", "questions"
    )
    apart, shared = rows[2], rows[3]
    assert (apart["case"], shared["case"]) == ("5 apart", "5 shared")
    # Of 8 frames of 224 x 224 with 15 tokens before and one behind: V = 272, q = 25.
    assert (apart["tokens"], shared["tokens"]) == (4 * 5 * (272 + 25), 4 * (272 + 5 * 25))  # four documents a row
    assert shared["expected"] / apart["expected"] == pytest.approx((272 + 5 * 25) / (5 * (272 + 25)))


def test_gains(commands: Commands, tmp_path: Path) -> None:
    """The two ways of each line have the same loss, or the command fails."""
    rows = rows_of(commands, "gains.py", tmp_path / "gains.json", "--shape", "tiny", "--repeats", "1")
    assert len(rows) == 5 and all(row["loss differs by"] <= 1e-4 and row["gain"] > 0 for row in rows)


def test_windows_one_by_one_are_a_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a gain is compared with does happen: the components' attention goes the other way, with the same result."""
    monkeypatch.syspath_prepend(str(BENCH))
    from gains import each_segment_alone

    calls: list[int] = []
    attend_once = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend_once(*a, **k))
    attention, plan = VisionAttention(8, 2), blocks_plan([4, 4, 4])
    x_PE, angles_PK = torch.randn(12, 8), torch.zeros(12, 4)
    together = attention(x_PE, angles_PK.cos(), angles_PK.sin(), plan)
    before = len(calls)
    with each_segment_alone():
        apart = attention(x_PE, angles_PK.cos(), angles_PK.sin(), plan)
    torch.testing.assert_close(apart, together)
    assert (before, len(calls) - before) == (1, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("step.py", ("--video", "1.5"), "--video 1.5: must be 0 to 1"),
        ("step.py", ("--tokens", "0"), "--tokens 0: must be at least 1"),
        ("scaling.py", ("--repeats", "0"), "--repeats 0: must be at least 1"),
        ("gains.py", ("--repeats", "-1"), "--repeats -1: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(commands: Commands, name: str, arguments: tuple[str, ...], message: str) -> None:
    assert message in commands.run(str(BENCH / name), *arguments).error
