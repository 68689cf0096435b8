"""Checkpoints of one process: what is in them, what is read back, what is refused; writing beside the loop."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.distributed.saving import SHAPES, Trained, check, values
from tests.helpers.allocations import allocated_peak
from tests.helpers.tiny import Tiny
from vft.common.errors import UserError
from vft.common.safetensors_io import write_tensors
from vft.config.run import TrainConfig
from vft.models import weights
from vft.models.pretrained import Pretrained
from vft.models.weights import export_model
from vft.training import checkpoint as checkpoints
from vft.training.optimizer import build_optimizer


def write_by_hand(folder: Path, files: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """A checkpoint as this project's first version wrote it, without this project."""
    folder.mkdir(parents=True)
    for name, tensors in files.items():
        save_file(dict(tensors), folder / name)
    (folder / "state.json").write_text(json.dumps({"cursor": {"epoch": 0}, "step": step}, indent=1) + "\n")
    described = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps({"step": step, "files": described}, indent=1) + "\n")


def by_file(step: int) -> dict[str, dict[str, Tensor]]:
    """The state of a step as its two files have it."""
    every = values(step)
    return {
        "trainable.safetensors": {name: every[name] for name in SHAPES},
        "optimizer.safetensors": {name: value for name, value in every.items() if name not in SHAPES},
    }


def test_one_process_writes_what_the_first_version_wrote(tmp_path: Path) -> None:
    trained = Trained()
    trained.fill(1)
    trained.saver(tmp_path / "ours", False).save(7, {"cursor": {"epoch": 0}})
    write_by_hand(tmp_path / "theirs" / "step-000007", by_file(1), 7)
    for name in ("trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        ours, theirs = (tmp_path / who / "step-000007" / name for who in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes(), name
        assert ours.stat().st_mode & 0o777 == theirs.stat().st_mode & 0o777 | 0o044


def test_checkpoints_of_the_first_version_are_read(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "step-000001", by_file(1), 1)
    assert check(tmp_path, Trained()) == 1


def test_tensors_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randn(70, 90, generator=generator),
        "b": torch.randn(3, 5, generator=generator).bfloat16(),
        "a": torch.randn(7, generator=generator).half(),
        "é": torch.randn((), generator=generator),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(6, 4, generator=generator).t(),
    }
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    facts = write_tensors(tmp_path / "ours", layout, tensors.__getitem__, {"format": "pt"})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    content = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == content
    assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(FileExistsError):  # a process that outlived its run can't be written over, nor write over us
        write_tensors(tmp_path / "ours", layout, tensors.__getitem__)


@pytest.mark.parametrize(
    ("file", "name", "shape", "message"),
    [
        ("trainable", "0.weight", (7, 63), "the model's has shape [7, 64], the files have [7, 63] from row 0"),
        ("optimizer", "exp_avg.0.bias", (6,), "the model's has shape [7], the files have [6] from row 0"),
        ("trainable", "1.bias", (2,), "the model's has shape [1], the files have [2] from row 0"),
        ("optimizer", "exp_avg_sq.1.weight", None, "the model's has shape [1, 7], the files have none"),
        ("trainable", "1.weight", None, "1 trained tensors differ from the model's, 1.weight among them"),
    ],
    ids=["narrower", "fewer rows", "more rows", "no moment", "no parameter"],
)
def test_tensors_that_are_not_the_models(
    tmp_path: Path, file: str, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    files = by_file(1)
    tensors = files[f"{file}.safetensors"]
    tensors.pop(name)
    if shape is not None:
        tensors[name] = torch.zeros(shape)
    write_by_hand(tmp_path / "step-000001", files, 1)
    trained = Trained()
    with pytest.raises(UserError) as raised:
        checkpoints.load(tmp_path / "step-000001", trained.model, trained.optimizer)
    assert message in str(raised.value) and name in str(raised.value) and str(tmp_path) in str(raised.value)


def sharded_by_hand(folder: Path, bounds: list[tuple[int, int]]) -> None:
    """A checkpoint of `0.weight` alone in files of so many rows, from one number to another."""
    weight = values(1)["0.weight"]
    folder.mkdir()
    files: dict[str, Any] = {}
    for number, (first, end) in enumerate(bounds, 1):
        for file, names in (("trainable", ["w"]), ("optimizer", ["exp_avg.w", "exp_avg_sq.w"])):
            tensors = {name: weight[first:end].clone() for name in names}
            offsets = {name: {"saved_offsets": [first, 0]} for name in names}
            if file == "optimizer" and number == 1:
                tensors["step.w"], offsets["step.w"] = torch.tensor(3.0), {"saved_offsets": []}
            name = f"{file}-{number:05d}-of-{len(bounds):05d}.safetensors"
            save_file(tensors, folder / name, {"DCP_SHARDING_INFO": json.dumps(offsets)})
            files[name] = {}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize(
    ("bounds", "good"),
    [
        ([(0, 4), (4, 7)], True),
        ([(4, 7), (0, 4)], True),
        ([(0, 4), (5, 7)], False),
        ([(0, 4), (3, 7)], False),
        ([(0, 4), (4, 6)], False),
        ([(1, 4), (4, 7)], False),
    ],
)
def test_rows_that_are_missing_or_there_twice(tmp_path: Path, bounds: list[tuple[int, int]], good: bool) -> None:
    sharded_by_hand(tmp_path / "step-000001", bounds)
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(7, 64))
    optimizer = build_optimizer(model, TrainConfig(max_steps=1))
    if not good:
        with pytest.raises(UserError, match=r"w: the model's has shape \[7, 64\], the files have .* from row"):
            checkpoints.load(tmp_path / "step-000001", model, optimizer)
        return
    checkpoints.load(tmp_path / "step-000001", model, optimizer)
    slots = optimizer.state[model.w]
    for tensor in (model.w, slots["exp_avg"], slots["exp_avg_sq"]):
        assert tensor.equal(values(1)["0.weight"])
    assert slots["step"] == 3


# ---------------------------------------------------------------------------------------------- writing beside the loop


class Gate:
    """Holds up writing until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.opened, self.calls = threading.Event(), threading.Event(), 0
        real = checkpoints.write_parts

        def write_parts(*arguments: Any) -> Any:
            self.calls += 1
            self.entered.set()
            assert self.opened.wait(20)
            return real(*arguments)

        monkeypatch.setattr(checkpoints, "write_parts", write_parts)


def test_what_is_saved_is_of_the_step_of_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, trained = Gate(monkeypatch), Trained()
    saver, state = trained.saver(tmp_path, True), {"bad": ["one"]}
    trained.fill(1)
    saver.save(1, state)  # comes back although nothing can be written
    trained.fill(2)
    state["bad"].append("two")
    assert gate.entered.wait(20) and not checkpoints.list_checkpoints(tmp_path)
    gate.opened.set()
    saver.wait()
    assert check(tmp_path, Trained()) == 1
    assert json.loads((tmp_path / "step-000001" / "state.json").read_text()) == {"bad": ["one"], "step": 1}


def test_one_save_at_a_time_in_memory_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, trained = Gate(monkeypatch), Trained()
    saver = trained.saver(tmp_path, True)
    trained.fill(1)
    saver.save(1, {})
    places = {name: tensor.data_ptr() for name, tensor in saver.copies.items()}
    trained.fill(2)
    second = threading.Thread(target=saver.save, args=(2, {}))
    second.start()
    second.join(0.3)
    assert second.is_alive() and gate.calls == 1  # the first one is still in the way
    gate.opened.set()
    second.join(20)
    saver.wait()
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-000002", "step-000001"]
    assert check(tmp_path, Trained()) == 2
    assert {name: tensor.data_ptr() for name, tensor in saver.copies.items()} == places
    assert len(places) == len(values(1))


def test_a_host_without_room_for_copies_saves_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert 0 < checkpoints.available_memory() < 2**50
    size = sum(value.nbytes for value in values(1).values())
    trained = Trained()
    trained.fill(1)
    for free, asynchronous in ((size, True), (size - 1, False)):
        monkeypatch.setattr(checkpoints, "available_memory", lambda free=free: free)
        saver = trained.saver(tmp_path, True)
        saver.save(1, {})
        assert (saver.in_flight is not None) == asynchronous
        saver.wait()
        assert check(tmp_path, Trained()) == 1
        assert ("saves will stop the loop" in caplog.text) != asynchronous


def test_saving_in_the_loop_copies_nothing(tmp_path: Path) -> None:
    trained = Trained()
    saver = trained.saver(tmp_path, False)
    assert allocated_peak(lambda: saver.save(1, {})) < 1000
    assert saver.in_flight is None and checkpoints.list_checkpoints(tmp_path)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_folder_that_can_not_be_written(tmp_path: Path, asynchronous: bool) -> None:
    trained, root = Trained(), tmp_path / "checkpoints"
    saver = trained.saver(root, asynchronous)
    root.write_text("no folder")
    with pytest.raises(UserError, match=r"step-000001: can't be written \(.*\); free space"):
        saver.save(1, {})
        saver.wait()
    assert not saver.failed  # it is told once
    root.unlink()
    saver.save(2, {})
    saver.wait()
    assert [path.name for path in checkpoints.list_checkpoints(root)] == ["step-000002"]


def test_too_little_room_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saver, free = Trained().saver(tmp_path / "run" / "checkpoints", True), 0
    size = sum(value.nbytes for value in values(1).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    free = size - 1
    for call in (lambda: saver.check_space_for(100), lambda: saver.save(1, {})):
        with pytest.raises(UserError, match=r"a checkpoint takes 0\.1 MB, 0\.1 MB are free on the disk"):
            call()
    assert not (tmp_path / "run").exists()
    # 3 are kept, and one more lies there while it is written; 2 saves are all that 100 steps make.
    for steps, wanted in ((1000, 4), (100, 2)):
        free = wanted * size
        saver.check_space_for(steps)
        assert not caplog.messages
        free = wanted * size - 1
        saver.check_space_for(steps)
        assert f"{wanted} more checkpoints of 0.1 MB come to" in caplog.text
        caplog.clear()
    saver.save(50, {})
    saver.wait()
    free = 3 * size
    saver.check_space_for(1000)  # one is there already
    free = 0
    saver.check_space_for(0)  # a run that is over saves nothing
    assert not caplog.messages


# ------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("write", [True, False])
def test_an_export_holds_one_tensor_at_a_time(
    tiny_bf16: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: bool
) -> None:
    model = tiny_bf16.ours()  # in float32, as trained; the files are bfloat16
    base = Pretrained.open(str(tiny_bf16.path))
    # Opened before: a file that is mapped counts as allocated.
    opened = {file: weights.open_tensors(file) for file in base.weight_files.values()}
    monkeypatch.setattr(weights, "open_tensors", lambda file: nullcontext(opened[file]))
    largest = max(parameter.numel() for parameter in model.parameters())
    peak = allocated_peak(lambda: export_model(model, base, tmp_path / "model", {}, write))
    assert peak == 2 * largest
    if write:
        for file in set(base.weight_files.values()):
            expected, found = load_file(file), load_file(tmp_path / "model" / file.name)
            assert expected.keys() == found.keys()
            assert all(
                found[name].equal(value) and found[name].dtype == value.dtype for name, value in expected.items()
            )
