"""The pretend device finds mistakes that the CPU hides. Each is planted in a run that is right without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.accelerator.conftest import Pretend
from tests.runs.commands import CAPTION, column
from tests.runs.world import World

FOUND = {
    "host_read_in_forward": "the host waits for the device (_local_scalar_dense)",
    "host_read_in_backward": "the host waits for the device (_local_scalar_dense)",
    "index_by_mask": "the host waits for the device (index by a mask)",
    "index_on_the_host": "expects all tensors on cuda:0",
    "stride_0_pin": "more than one element of the written-to tensor refers to a single memory location",
    "pageable_copy": "the host waits for the device (copy from pageable memory)",
    "pinned_buffer_reused": "pinned memory was changed before its copy to the device was complete",
}
IN_A_STEP = "Trainer.train_step,check_first_step,AsyncCheckpointer._copied"
"""Functions that may wait in a step: they read its loss and norm, look at the first gradients, or save."""


def config(world: World, folder: Path, precision: str = "bf16") -> Path:
    train = {"max_steps": 3, "precision": precision}
    given = {"activation_checkpointing": "none", "compile": False}  # or a plan would meet the fault first
    saves = {"every_steps": 1, "keep_last": 0}
    return world.config(folder / "run.toml", {"train": train, "checkpoint": saves, "parallel": given})


@pytest.mark.parametrize("fault", FOUND)
def test_is_found(world: World, pretend: Pretend, tmp_path: Path, fault: str) -> None:
    run = pretend("--plant", fault, "--allow", IN_A_STEP, CAPTION, config(world, tmp_path))
    assert run.result.status != 0 and FOUND[fault] in run.result.stderr.splitlines()[-1]


@pytest.mark.parametrize("fault", [None, "save_without_synchronize"])
def test_checkpoints_hold_the_weights_of_their_step(
    world: World, pretend: Pretend, tmp_path: Path, fault: str | None
) -> None:
    """They are written while training goes on, so each is compared with a copy made after its step."""
    plant = ("--plant", fault) if fault else ()
    run = pretend(*plant, "--allow", IN_A_STEP, CAPTION, config(world, tmp_path))
    run.result.ok()
    wrong = 0
    for step in (1, 2, 3):
        saved = load_file(tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "trainable.safetensors")
        right = load_file(run.notes / f"step-{step:06d}.safetensors")
        assert saved.keys() == right.keys()
        wrong += sum(not torch.equal(saved[name], right[name]) for name in saved)
    assert (wrong > 0) == (fault is not None)


@pytest.mark.parametrize(("kernel", "trouble"), [("missing", "can't run"), ("nan", "gives other results")])
def test_a_kernel_that_is_missing_or_gives_nan_is_replaced(
    world: World, pretend: Pretend, tmp_path: Path, kernel: str, trouble: str
) -> None:
    """With a warning, and the run gives what it gives without a kernel."""
    losses = []
    for name in (kernel, "exact"):
        result = pretend("--kernel", name, CAPTION, config(world, tmp_path / name)).result.ok()
        assert ("attention takes the slower path" in result.stderr) == (name == kernel)
        assert (trouble in result.stderr) == (name == kernel)
        losses.append(column(tmp_path / name / "run", "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
