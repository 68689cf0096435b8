"""tools/plan.py: what it counts is what a sharded run takes, and what it advises fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import Tiny
from tests.runs.commands import Commands, Result
from tests.runs.fixtures import commands as commands
from tests.runs.processes import run_together

RECIPE = "recipes/qwen2_5_vl_72b/caption.toml"
NF4_RECIPE = "recipes/qwen2_5_vl_72b/caption_nf4.toml"


Plan = Callable[..., Result]


@pytest.fixture
def plan(commands: Commands) -> Plan:
    """The tool with its arguments."""
    return partial(commands.run, "tools/plan.py")


def figures(shown: str) -> dict[str, list[float]]:
    """Rows of numbers by their label."""
    rows = re.findall(r"│ ([A-Za-z4, ]+?)\s+│(.*)│", shown)
    return {label: [float(cell) for cell in re.findall(r"[\d.]+", cells)] for label, cells in rows if "│" not in label}


@pytest.mark.parametrize(("mode", "quantize"), [("none", "none"), ("full", "none"), ("full", "nf4")])
def test_the_peak_is_that_of_two_processes(
    tiny: Tiny, commands: Commands, tmp_path: Path, mode: str, quantize: str
) -> None:
    """FSDP2's own steps, counted for a group that is not there, beside what the allocator gave out in a real one."""
    found = {}
    for kind, processes in (("planned", 1), ("real", 2)):
        output = tmp_path / f"{kind}.json"
        for result in run_together(
            commands, processes, "tests.distributed.sharded_memory", kind, tiny.path, mode, quantize, output
        ):
            result.ok()
        found[kind] = json.loads(output.read_text())
    assert found["planned"]["peak"] == pytest.approx(found["real"]["peak"], rel=0.1)
    assert 0 < found["planned"]["gathered"] < found["planned"]["peak"]


@pytest.mark.parametrize("memory", ["192", pytest.param("80", marks=pytest.mark.slow)])
def test_the_72b_on_8_gpus(plan: Plan, memory: str) -> None:
    done = plan(RECIPE, "--gpus", "8", "--gpu-memory-gib", memory)
    assert done.status == 0 and "fits" in done.stdout.splitlines()[-14:][0] + done.stdout, done.stderr
    rows = figures(done.stdout)
    # 146.8 GB of weights, of which the tower's 1.4 GB are whole on each: 18.2 GiB.
    assert rows["frozen weights"] == [pytest.approx(18.24, abs=0.05)]
    parts = ("frozen weights", "trained weights", "optimizer", "gathered weights", "activations, gradients")
    assert sum(rows[name][0] for name in parts) == pytest.approx(rows["total"][0], abs=0.05)
    for what in ("step", "tokens", "samples", "run", "traffic", "loading", "loading, host", "disk"):
        assert re.search(rf"│ {what}\s+│ [\d.,]+ ", done.stdout), what


def test_the_72b_in_4_bits_on_one_gpu(plan: Plan) -> None:
    """Its linears are 70.16 G weights of 9/16 byte, 36.75 GiB; the rest is bf16: head and embedding 4.64 GiB, tower."""
    done = plan(NF4_RECIPE, "--gpus", "1", "--gpu-memory-gib", "80")
    assert done.status == 0 and "fits" in done.stdout, done.stderr
    rows = figures(done.stdout)
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 29568
    assert rows["NF4 weights"] == [pytest.approx(80 * layer * (0.5 + 4 / 64) / 2**30, abs=0.01)]
    assert rows["frozen weights"] == [pytest.approx(5.9, abs=0.1)]
    parts = ("NF4 weights", "frozen weights", "trained weights", "optimizer", "activations, gradients")
    assert sum(rows[name][0] for name in parts) == pytest.approx(rows["total"][0], abs=0.05)
    # What is read from the disk is the released bf16 file.
    assert re.search(r"│ loading\s+│ 7\d s\s+│ 147 GB", done.stdout)


SMALL = ("recipes/qwen2_5_vl_7b/caption.toml", "--gpus", "2", "parallel.activation_checkpointing=none")
WIDE = ("data.max_samples_per_pack=0", "data.pack_tokens=2048")


def test_what_does_not_fit_is_mended_and_checked(plan: Plan) -> None:
    """The advice is what was tried and fits."""
    done = plan(*SMALL, *WIDE, "--gpu-memory-gib", "16")
    assert done.status == 0
    assert "fits with parallel.activation_checkpointing=mlp (checked)" in done.stdout
    totals = figures(done.stdout)["total"]
    assert len(totals) == 2 and totals[0] > 16 * 0.95 >= totals[1]


def test_layers_that_stay_gathered_are_counted(plan: Plan) -> None:
    """28 layers of 466 MB instead of two: given up again, the run fits."""
    done = plan(*SMALL, *WIDE, "parallel.reshard_after_forward=false", "--gpu-memory-gib", "20")
    assert done.status == 0 and "fits with parallel.reshard_after_forward=true (checked)" in done.stdout
    rows = figures(done.stdout)
    assert rows["gathered weights"][0] - rows["gathered weights"][1] == pytest.approx(26 * 0.466e9 / 2**30, rel=0.1)


@pytest.mark.slow
def test_the_host_takes_what_no_gpu_holds(plan: Plan) -> None:
    """With every mode tried, the frozen matrices of the layers go to the host: 13.05 GB over two GPUs."""
    done = plan(*SMALL, *WIDE, "--gpu-memory-gib", "12")
    change = "parallel.activation_checkpointing=full parallel.offload=frozen (checked)"
    assert done.status == 0 and change in " ".join(done.stdout.split())
    rows = figures(done.stdout)
    assert len(rows["total"]) == 5 and rows["total"][3] > 12 * 0.95 >= rows["total"][4]
    matrices = 2 * 28 * (2 * 3584**2 + 2 * 512 * 3584 + 3 * 18944 * 3584) / 2  # bytes on each
    assert rows["frozen weights"][3] - rows["frozen weights"][4] == pytest.approx(matrices / 2**30, abs=0.02)
    assert matrices / 2**30 <= rows["host memory for it"][4] <= 2 * matrices / 2**30


@pytest.mark.slow
def test_where_nothing_fits(plan: Plan) -> None:
    done = plan(*SMALL, *WIDE, "--gpu-memory-gib", "4")
    assert done.status == 1 and "does not fit" in done.stdout
    assert len(figures(done.stdout)["total"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0", "--gpu-memory-gib", "80"), "--gpus 0: must be above 0"),
        (("--gpus", "8", "--gpu-memory-gib", "80", "--efficiency", "1.5"), "--efficiency 1.5: must be above 0"),
        (("--gpus", "8", "--gpu-memory-gib", "80", "parallel.shard=3"), "parallel.shard = 3: doesn't divide"),
        (("--gpus", "8", "--gpu-memory-gib", "80", "train.epoch=3"), "train.epoch"),
    ],
)
def test_a_mistake_is_one_line(plan: Plan, arguments: tuple[str, ...], message: str) -> None:
    assert message in plan(RECIPE, *arguments).error
