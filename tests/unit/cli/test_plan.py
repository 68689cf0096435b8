"""tools/plan.py: what it counts is what a sharded run takes, and what it advises fits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.tiny import Tiny
from tests.runs.commands import Commands, Result
from tests.runs.fixtures import commands as commands
from tests.runs.processes import run_together
from vft.cli import plan as plan_tool
from vft.config import run as configs
from vft.preparation.planning import build_planned

ROOT = Path(__file__).parents[3]

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
            commands, processes, "tests.distributed.sharded", "memory", tiny.path, kind, mode, quantize, output
        ):
            result.ok()
        found[kind] = json.loads(output.read_text())
    assert found["planned"]["peak"] == pytest.approx(found["real"]["peak"], rel=0.1)
    assert 0 < found["planned"]["gathered"] < found["planned"]["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["192", "80"])
def test_the_72b_on_8_gpus(plan: Plan, memory: str) -> None:
    done = plan(RECIPE, "--gpus", "8", "--gpu-memory-gib", memory, "--gpu", "MI300X", "parallel.shard=0")
    assert done.status == 0 and "fits" in done.stdout, done.stderr
    rows = figures(done.stdout)
    # 146.8 GB of weights, of which the encoder's 1.4 GB are whole on each: 18.2 GiB.
    assert rows["frozen weights"][0] == pytest.approx(18.24, abs=0.05)
    parts = ("frozen weights", "trained weights", "optimizer", "gathered weights", "activations, gradients")
    assert sum(rows[name][0] for name in parts) == pytest.approx(rows["total"][0], abs=0.05)
    for what in ("step", "tokens", "samples", "run", "traffic", "loading", "loading, host", "disk"):
        assert re.search(rf"│ {what}\s+│ [\d.,]+ ", done.stdout), what


@pytest.mark.slow
def test_the_72b_in_4_bits_on_one_gpu(plan: Plan) -> None:
    """Its linears are 70.16 G weights of 9/16 byte, 36.75 GiB; the rest is bf16: head and embedding 4.64 GiB."""
    done = plan(NF4_RECIPE, "--gpus", "1", "--gpu-memory-gib", "80", "parallel.activation_checkpointing=full")
    assert done.status == 0 and "fits" in done.stdout, done.stderr
    rows = figures(done.stdout)
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 29568
    assert rows["NF4 weights"] == [pytest.approx(80 * layer * (0.5 + 4 / 64) / 2**30, abs=0.01)]
    assert rows["frozen weights"] == [pytest.approx(5.9, abs=0.1)]
    parts = ("NF4 weights", "frozen weights", "trained weights", "optimizer", "activations, gradients")
    assert sum(rows[name][0] for name in parts) == pytest.approx(rows["total"][0], abs=0.05)
    # What is read from the disk is the released bf16 file.
    assert re.search(r"│ loading\s+│ 7\d s\s+│ 147 GB", done.stdout)


SMALL = (
    *("recipes/qwen2_5_vl_7b/caption.toml", "--gpus", "2"),
    *("parallel.activation_checkpointing=none", "parallel.shard=0"),
)
ONE = ("recipes/qwen2_5_vl_7b/caption.toml", "--gpus", "1", "parallel.activation_checkpointing=none")
WIDE = ("data.max_samples_per_pack=0", "data.pack_tokens=2048")


@pytest.mark.slow
def test_what_does_not_fit_is_fixed_and_checked(plan: Plan) -> None:
    """The advice is what was tried and fits."""
    done = plan(*SMALL, *WIDE, "--gpu-memory-gib", "17.7")
    assert done.status == 0
    assert "fits with parallel.activation_checkpointing=selective (checked)" in done.stdout
    totals = figures(done.stdout)["total"]
    assert len(totals) == 2 and totals[0] > 17.7 - 2.5 >= totals[1]


@pytest.mark.slow
def test_layers_that_stay_gathered_are_counted(plan: Plan) -> None:
    """28 layers of 466 MB instead of two: given up again, the run fits."""
    done = plan(*SMALL, *WIDE, "parallel.reshard_after_forward=false", "--gpu-memory-gib", "21.5")
    assert done.status == 0 and "fits with parallel.reshard_after_forward=true (checked)" in done.stdout
    rows = figures(done.stdout)
    assert rows["gathered weights"][0] - rows["gathered weights"][1] == pytest.approx(26 * 0.466e9 / 2**30, rel=0.1)


@pytest.mark.slow
def test_the_host_takes_what_no_gpu_holds(plan: Plan) -> None:
    """With every mode tried, the frozen matrices of the layers go to the host: 13.05 GB over two GPUs."""
    done = plan(*SMALL, *WIDE, "--gpu-memory-gib", "13.9")
    change = "parallel.activation_checkpointing=full parallel.offload=frozen (checked)"
    assert done.status == 0 and change in " ".join(done.stdout.split())
    rows = figures(done.stdout)
    assert rows["total"][3] > 13.9 - 2.5 >= rows["total"][4]
    matrices = 2 * 28 * (2 * 3584**2 + 2 * 512 * 3584 + 3 * 18944 * 3584) / 2  # bytes on each
    assert rows["frozen weights"][3] - rows["frozen weights"][4] == pytest.approx(matrices / 2**30, abs=0.02)
    assert matrices / 2**30 <= rows["host memory for it"][4] <= 2 * matrices / 2**30


@pytest.mark.slow
def test_where_nothing_fits(plan: Plan) -> None:
    done = plan(*SMALL, *WIDE, "--gpu-memory-gib", "4")
    assert done.status == 1 and "does not fit" in done.stdout
    assert len(figures(done.stdout)["total"]) == 6


def test_shard_1_is_proposed_where_the_model_fits(plan: Plan) -> None:
    """Nothing is gathered then: of the 7B's traffic only the adapters' gradients are left."""
    done = plan(*SMALL, "parallel.activation_checkpointing=full", "--gpu-memory-gib", "80", "--gpu", "4090")
    told = " ".join(done.stdout.split())
    assert "fits faster, and fits too: parallel.shard=1 parallel.activation_checkpointing=none (checked)" in told
    found = re.search(r": ([\d.]+) s a step instead of ([\d.]+) s", told)
    assert found and float(found[1]) < float(found[2])
    assert "bound by links between GPUs" in told  # 7 G weights of 2 bytes, gathered 16 times over PCIe


def test_one_gpu_is_advised_nothing_about_gathering(plan: Plan) -> None:
    done = plan(*ONE, "parallel.reshard_after_forward=false", "--gpu", "H100")
    assert "on 1 x 80 GiB;" in done.stdout
    assert done.status == 0 and "shard" not in done.stdout and "faster" not in done.stdout
    assert "│ links" not in done.stdout and "traffic" not in done.stdout


@pytest.mark.slow
def test_4_bits_are_proposed_where_recomputing_is_not_enough(plan: Plan) -> None:
    """13 GB of frozen matrices go to the host or shrink to 3.7 GB; either is said."""
    done = plan(*ONE, "parallel.activation_checkpointing=full", "--gpu-memory-gib", "15.8")
    assert done.status == 0, done.stdout + done.stderr
    assert "fits with parallel.offload=frozen (checked)" in done.stdout
    assert "fits too: model.quantize=nf4 (checked)" in done.stdout


@pytest.mark.slow
def test_full_fine_tuning_says_how_many_gpus_it_needs(plan: Plan) -> None:
    """12 bytes a trained weight and the gradients: 7.6 G weights don't fit 2 x 40 GiB, nor does offloading help."""
    full = ("lora=", 'model.train=["language_model"]', "parallel.activation_checkpointing=full")
    done = plan(*SMALL, *full, "--gpu-memory-gib", "40")
    told = " ".join(done.stdout.split())
    assert done.status == 1 and "does not fit" in told and "offload" not in told and "nf4" not in told
    assert "4 GPUs of 40 GiB hold it" in told and "a [lora] table" in told
    held = plan(*SMALL, *full, "--gpu-memory-gib", "40", "--gpus", "4")
    assert held.status == 0 and "fits" in held.stdout


@pytest.mark.parametrize("factor", [None, 2.0, 4.0])
def test_a_released_model_has_the_context_of_its_rope_factor(factor: float | None) -> None:
    """By its hub name, which is not fetched: LLaVA-NeXT-Video's Vicuna has 4,096 positions."""
    model = {"path": "llava-hf/LLaVA-NeXT-Video-7B-hf", "rope_factor": factor}
    config = configs.Config.model_validate({"output_dir": "run", "model": model})
    assert build_planned(config).processor.context_tokens == 4096 * (factor or 1)


def test_as_json(plan: Plan) -> None:
    """43.5 MiB are too few without recomputation, and enough with some; the rest follows from the parts."""
    size = ("--gpus", "1", "--gpu", "4090", "--gpu-memory-gib", "2.5425")
    done = plan("recipes/demo/caption.toml", *size, "--json", "parallel.activation_checkpointing=none")
    made = json.loads(done.ok().stdout)
    assert made["fits"] and made["best"] == 1 and [one["fits"] for one in made["tried"]] == [False, True]
    for one in made["tried"]:
        assert one["total_gib"] == pytest.approx(sum(one["gib"].values()))
        assert one["fits"] == (one["total_gib"] <= made["usable_gib"] == pytest.approx(0.0425))
    needed = made["proposals"][0]
    assert (needed["why"], needed["set"]) == ("needed", {"parallel.activation_checkpointing": "selective"})
    assert made["run"]["hours"] == pytest.approx(200 * needed["step_s"] / 3600)


def test_what_is_faster_says_nothing_of_shards_on_one_gpu(plan: Plan) -> None:
    again = "parallel.activation_checkpointing=full"
    done = plan("recipes/demo/caption.toml", "--gpus", "1", "--gpu", "4090", "--json", again)
    made = json.loads(done.ok().stdout)
    (faster,) = made["proposals"]
    assert (faster["why"], faster["set"]) == ("faster", {"parallel.activation_checkpointing": "none"})


def test_times_are_those_of_the_card_or_none(plan: Plan) -> None:
    done = plan(*ONE, "--gpu-memory-gib", "80")
    assert "no times: name the card with --gpu" in done.stdout and not re.search(r"│ (step|run|tokens) ", done.stdout)


def test_a_run_in_epochs_has_its_hours(tmp_path: Path) -> None:
    """2 epochs of 40 samples, one a row, 16 rows a step of 36 s: 5 steps."""
    turns = [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "This."}]
    records = [{"id": str(i), "video": f"{i}.mp4", "conversations": turns} for i in range(40)]
    for i in range(40):
        (tmp_path / f"{i}.mp4").touch()
    (tmp_path / "train.json").write_text(json.dumps(records))
    epochs = ("train.max_steps=", "train.epochs=2", "train.warmup_steps=0", f"data.root={tmp_path}")
    there = configs.load(ROOT / ONE[0], [*epochs, 'data.sources=[{format="messages", path="train.json"}]'])
    hours, told = plan_tool.run_hours(there, 36.0, 1, None)
    assert hours == "0.05 hours" and told.startswith("2 epoch(s) of 40 samples, 5 steps at most")
    elsewhere = configs.load(ROOT / ONE[0], [*epochs, 'data.sources=[{format="messages", path="gone.json"}]'])
    assert plan_tool.run_hours(elsewhere, 36.0, 1, None)[0] == "?"
    assert plan_tool.run_hours(elsewhere, 36.0, 1, 40) == (hours, told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "1"), "--gpu-memory-gib: is missing; give it, or name the card with --gpu"),
        (("--gpus", "0", "--gpu-memory-gib", "80"), "--gpus = 0: must be greater than or equal to 1"),
        (
            ("--gpus", "8", "--gpu-memory-gib", "80", "--efficiency", "1.5"),
            "--efficiency = 1.5: must be less than or equal to 1",
        ),
        (("--gpus", "8", "--gpu-memory-gib", "80", "parallel.shard=3"), "parallel.shard = 3: doesn't divide"),
        (("--gpus", "8", "--gpu-memory-gib", "80", "train.epoch=3"), "train.epoch"),
        (("--gpus", "3", "--gpu-memory-gib", "80"), "train.packs_per_step = 16: must be a multiple of the number"),
        (("--gpus", "8", "--gpu-memory-gib", "nan"), "--gpu-memory-gib = nan: must be"),
    ],
)
def test_a_mistake_is_one_line(plan: Plan, arguments: tuple[str, ...], message: str) -> None:
    assert message in plan(RECIPE, *arguments).error
