"""The benchmarks on the smallest sizes: their tables and counts, and that they compare like with like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peer
import pytest
import torch
import torch.nn.functional as F
from gains import each_segment_alone

from tests.runs.commands import Commands
from tests.runs.fixtures import commands as commands
from vft.common.errors import UserError
from vft.models.attention import blocks_plan
from vft.models.layers import VisionAttention

BENCH = Path(__file__).parents[3] / "tools/bench"


@pytest.fixture
def figures(commands: Commands, tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the benchmark with these options writes, which it also shows."""
    name, *options = request.param.split()
    folder = ("--folder", tmp_path) if name == "checkpoint.py" else ()
    done = commands.run(str(BENCH / name), *options, *folder, "--output", tmp_path / "made.json").ok()
    made: dict[str, Any] = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert made["environment"]["cpus"] > 0 and made["title"] in " ".join(done.stdout.split()) and made["settings"]
    assert not list(tmp_path.glob("vft-*"))
    return made


def bench(options: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("figures", [options], indirect=True, ids=[options.split(".")[0]])


# The usual processor is left out: to import what it needs takes longer than all the rest.
@bench(
    "data.py --sizes 64x56 --seconds 1 --fps 8 --max-frames 8 --max-pixels 3136 --count 2 --samples 4 --repeats 2 "
    "--cores 1 --without-processor"
)
def test_data(figures: dict[str, Any]) -> None:
    rows = figures["rows"]
    assert [row["side"] for row in rows] == ["vft", "torchcodec", "patches", "cached"]
    for row in rows:
        assert (row["clips"], row["cores"], row["frames"]) == ("64x56, 8 fps", 1, 4 * 8)
        assert row["frames/s"] == pytest.approx(8 * row["samples/s"]) and row["frames/s"] > 0
        assert row["frames/CPU s"] > 0
    assert rows[1]["of bare"] == 1 and 0 < rows[0]["of bare"] < 5


@pytest.mark.slow
@bench("startup.py --records 9000 --videos 1200 --processes 2")
def test_startup(figures: dict[str, Any]) -> None:
    bare, first, warm, resumed = figures["rows"]
    assert [row["start"] for row in figures["rows"]] == ["bare", "first", "warm", "resume"]
    assert first["documents"] == warm["documents"] == 1200 and first["digest"] == warm["digest"] == resumed["digest"]
    assert first["ids"] == warm["ids"] != resumed["ids"]
    assert warm["CPU s a process"] < first["CPU s a process"] and warm["MiB a process"] < bare["MiB a process"] + 100


@pytest.mark.slow
@bench("load.py --shape tiny --repeats 1 --device cpu")
def test_load(figures: dict[str, Any]) -> None:
    rows = {row["way"]: row for row in figures["rows"]}
    assert list(rows) == ["vft", "safetensors, copied", "transformers"]
    sizes = [row["model GiB"] * 2**30 for row in rows.values()]
    assert max(sizes) - min(sizes) < 4096 and figures["file_bytes"] == pytest.approx(sizes[0], rel=0.05)
    for row in rows.values():
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"] < 60 and row["GiB/s"] > 0
    assert rows["vft"]["time / vft's"] == 1


@bench("checkpoint.py --shape tiny --ranks 4 --full --repeats 1 --device cpu --steps 2 --tokens 32")
def test_checkpoint(figures: dict[str, Any]) -> None:
    lora, full = figures["rows"]
    assert (lora["trained"], full["trained"]) == ("LoRA rank 4", "full")
    for row in (lora, full):
        # Three float32 values a parameter: itself and two moments.
        assert row["MiB"] * 2**20 == pytest.approx(12 * row["parameters"], rel=0.2)
        parts = row["copy and write, s"] + row["hash, s"] + row["flush, s"]
        assert parts == pytest.approx(row["save, s"]) and min(row["hash, s"], row["flush, s"], row["load, s"]) > 0
    assert full["parameters"] > lora["parameters"] > 0
    kinds = ("none", "in the loop", "beside the loop")
    assert [(row["trained"], row["saves"]) for row in figures["stalls"]] == [
        (t, k) for t in ("LoRA rank 4", "full") for k in kinds
    ]
    for row in figures["stalls"]:
        assert (row["stall, s"] == 0) == (row["saves"] == "none") and row["stall, s"] < row["between saves, s"]


@bench("step.py --shape tiny --tokens 400 --repeats 1 --questions 3 --modes none mlp full")
def test_step(figures: dict[str, Any]) -> None:
    rows = figures["rows"]
    assert [row["checkpointing"] for row in rows] == ["none", "mlp", "full"]
    planned = [row["planned GiB"] for row in rows]
    assert planned == sorted(planned, reverse=True) and planned[0] > planned[-1]
    for row in rows:
        assert row["tokens"] == 400 and row["TFLOP/s"] > 0
        assert row["tokens/s"] == pytest.approx(row["tokens"] / row["step s"])


@pytest.mark.slow
@bench("gains.py --shape tiny --repeats 1 --of questions packing parts")
def test_gains(figures: dict[str, Any]) -> None:
    """The two ways of each line have the same loss, or the command fails."""
    rows = {row["optimisation"]: row for row in figures["rows"]}
    assert len(rows) == 7 and all(row["loss differs by"] <= 1e-4 and row["gain"] > 0 for row in rows.values())
    # Of 8 frames of 224 x 224 with 15 tokens before and one behind: V = 272, q = 25. Four documents a row.
    shared = rows["5 questions on one video"]
    assert (shared["instead of"], shared["tokens"]) == (4 * 5 * (272 + 25), 4 * (272 + 5 * 25))
    assert shared["expected"] == pytest.approx((272 + 5 * 25) / (5 * (272 + 25)))
    assert shared["found / expected"] * shared["expected"] * shared["gain"] == pytest.approx(1)


def test_windows_one_by_one_are_a_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a gain is compared with does happen: the components' attention goes the other way, with the same result."""
    calls: list[int] = []
    attend_once = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend_once(*a, **k))
    attention, plan = VisionAttention(8, 2), blocks_plan([4, 4, 4])
    x_PE, angles_PK = torch.randn(12, 8), torch.zeros(12, 4)
    together = attention(x_PE, (angles_PK.cos(), angles_PK.sin()), plan)
    before = len(calls)
    with each_segment_alone():
        apart = attention(x_PE, (angles_PK.cos(), angles_PK.sin()), plan)
    torch.testing.assert_close(apart, together)
    assert (before, len(calls) - before) == (1, 3)


# Steps of two rows here and of batches of 3 and 1 there, whose answers differ in length: a mean of the batches' means
# would be another loss.
@bench(
    "peer.py --threads 1 --repeats 1 --shape tiny --clips 2 --questions 2 --mixed --frames 4 --workers 1 "
    "--samples-per-step 4 --pack 2 --peer-batch 3 --steps 1"
)
def test_both_sides_train_alike(figures: dict[str, Any]) -> None:
    steps = figures["steps"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step["loss, vft"] == pytest.approx(step["loss, peer"], rel=1e-5)
        assert step["gradient norm, vft"] == pytest.approx(step["gradient norm, peer"], rel=1e-4)
    # Equal losses would mean little if the updates moved nothing.
    assert steps[-1]["loss, vft"] < steps[0]["loss, vft"] - 0.1
    assert figures["largest_loss_difference"] == max(step["loss, relative difference"] for step in steps)
    ours, theirs = figures["rows"]
    assert ours["samples"] == theirs["samples"] == 4
    assert ours["supervised tokens"] == theirs["supervised tokens"] == steps[2]["supervised tokens"] > 0
    video = 4 // 2 * (224 // 28) ** 2
    # There each of the four questions has its video, here each of the two videos stands once; and there is padding.
    assert theirs["tokens"] - ours["tokens"] > 2 * video
    assert figures["ratio"] == pytest.approx(ours["samples/s"] / theirs["samples/s"])
    for row in (ours, theirs):
        assert row["samples/s"] == pytest.approx(4 / row["s a step"])
        assert 0 < row["CPU s a step"] < 60 and 0.1 < row["peak GiB"] < 4
    assert figures["settings"]["peer_batch"] == 3 and figures["environment"]["threads"] == 1


@pytest.mark.slow
@bench("pairs.py --threads 1 --repeats 1 --shape tiny --kind video --ratio 16 --pairs-per-step 2 --pack 2 --steps 1")
def test_pairs(figures: dict[str, Any]) -> None:
    """TRL's side too, where it is installed."""
    ours, *theirs = figures["rows"]
    assert (ours["side"], ours["samples"]) == ("vft", 2)
    assert ours["tokens"] < 2 * (256 + 60 + 2 * 25) and 0.1 < ours["peak GiB"] < 4
    for row in theirs:
        assert (row["side"], row["samples"]) == ("TRL", 2) and figures["difference"] < 1e-4
        assert row["supervised tokens"] == ours["supervised tokens"] and row["tokens"] > ours["tokens"] + 2 * 256


def test_steps_of_other_samples_are_no_comparison() -> None:
    ours, theirs = ({"samples": [4], "num_targets": [targets]} for targets in (7, 8))
    with pytest.raises(UserError, match=r"num_targets of the steps: \[7\] here, \[8\] there"):
        peer.compared(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("data.py --sizes 640", "--sizes 640: must be WIDTHxHEIGHT"),
        ("data.py --fps -1", "--fps -1.0: must be above 0"),
        ("load.py --model /no/such/folder", "no safetensors files"),
        ("checkpoint.py --ranks 0", "--ranks 0: must be above 0"),
        ("checkpoint.py --steps -1", "--steps -1: must be at least 0"),
        ("step.py --video 1.5", "--video 1.5: must be 0 to 1"),
        ("gains.py --repeats -1", "--repeats -1: must be above 0"),
        ("peer.py --questions 2 --samples-per-step 5", "--samples-per-step 5"),
        ("peer.py --model missing", "--model missing"),
        ("pairs.py --pack 3", "--pairs-per-step 4: --pack and --peer-batch must divide it"),
    ],
)
def test_a_mistake_is_one_line(commands: Commands, options: str, message: str) -> None:
    name, *rest = options.split()
    assert message in commands.run(str(BENCH / name), *rest).error
