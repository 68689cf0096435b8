"""Saves a small sharded model in as many processes as the environment says; the tests start it.

Arguments: what to do (a function below), a folder for checkpoints, then its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vft.common import safetensors_io as tensor_files
from vft.common.console import setup_logging
from vft.common.errors import UserError
from vft.common.files import remove_partials
from vft.config.run import CheckpointConfig, TrainConfig
from vft.distributed.process_group import environment, full_tensor, make_mesh, process_group
from vft.training import checkpoint as checkpoints
from vft.training.optimizer import build_optimizer

SHAPES = {"0.weight": (7, 64), "0.bias": (7,), "1.weight": (1, 7), "1.bias": (1,), "3.weight": (64, 130)}
"""What is trained: rows that no number of processes divides, fewer rows than processes, more than a block."""


class Trained:
    """A model with optimizer, filled with values that every step has of its own."""

    def __init__(self, shard: int = 0) -> None:
        self.world = environment()
        self.model = nn.Sequential(nn.Linear(64, 7), nn.Linear(7, 1), nn.Linear(1, 9), nn.Linear(130, 64, bias=False))
        self.model[2].requires_grad_(False)
        mesh = make_mesh(self.world, shard)
        if mesh is not None:
            fully_shard(self.model, mesh=mesh)
        self.optimizer = build_optimizer(self.model, TrainConfig(max_steps=1))
        assert {name: tuple(p.shape) for name, p in self.named()} == SHAPES

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def tensors(self) -> dict[str, Tensor]:
        """The state, by the names of the files."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.named():
            slots = self.optimizer.state[parameter]
            found[name] = parameter.detach()
            found |= {f"{key}.{name}": slots[key] for key in ("exp_avg", "exp_avg_sq", "step")}
        return found

    def fill(self, step: int) -> None:
        """The values of `step`, in place; torch itself shares them out."""
        expected = values(step)
        for name, tensor in self.tensors().items():
            value = expected[name]
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
            tensor.copy_(value)

    def whole(self) -> dict[str, Tensor]:
        """The state as one process would hold it."""
        return {name: full_tensor(tensor).clone() for name, tensor in self.tensors().items()}

    def saver(self, root: Path, asynchronous: bool, keep_last: int = 3) -> checkpoints.AsyncCheckpointer:
        """With its lines on stdout."""
        config = CheckpointConfig(asynchronous=asynchronous, keep_last=keep_last)
        return checkpoints.AsyncCheckpointer(root, self.model, self.optimizer, config, self.world)


def values(step: int) -> dict[str, Tensor]:
    """The whole state at a step, by the names of the files; no two tensors are alike."""
    found: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(100 * step + number)
        for kind in ("", "exp_avg.", "exp_avg_sq."):
            found[f"{kind}{name}"] = torch.randn(shape, generator=generator)
        found[f"step.{name}"] = torch.tensor(float(100 * step + number))
    return found


# -------------------------------------------------------------------------------------------------------- resharding


def reshard(root: Path, step: str, shard: str, asynchronous: str) -> None:
    """Load the newest checkpoint where there is one, write what was loaded and how many numbers each process read for
    it; then save the values of `step`."""
    read = 0
    with process_group(environment()):
        trained = Trained(int(shard))
        newest = checkpoints.newest_intact(root, trained.world)
        if newest is not None:
            with counted_reads() as count:
                state = checkpoints.load(newest, trained.model, trained.optimizer)
            read = sum(count)
            assert state["told"] == state["step"] == int(step) - 1
            whole = trained.whole()
            if trained.world.is_main:
                save_file(whole, root / f"loaded-{step}.safetensors")
        (root.parent / f"read-{step}-{trained.world.rank}").write_text(str(read))
        saver = trained.saver(root, asynchronous == "async")
        trained.fill(int(step))
        state = {"told": int(step)}
        saver.save(int(step), state)
        if asynchronous == "async":  # what training does next changes nothing of it
            state["told"] = -1
            trained.fill(999)
        saver.wait()


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Numbers taken out of files, read by read."""
    read: list[int] = []
    real = checkpoints.open_tensors

    class Slice:
        def __init__(self, inner: Any) -> None:
            self.inner, self.get_shape = inner, inner.get_shape

        def __getitem__(self, key: Any) -> Tensor:
            tensor: Tensor = self.inner[key]
            read.append(tensor.numel())
            return tensor

    @contextmanager
    def opened(file: Path) -> Iterator[SimpleNamespace]:
        with real(file) as inner:
            methods = {"keys": inner.keys, "metadata": inner.metadata}
            yield SimpleNamespace(**methods, get_slice=lambda name: Slice(inner.get_slice(name)))

    checkpoints.open_tensors = opened
    try:
        yield read
    finally:
        checkpoints.open_tensors = real


# -------------------------------------------------------------------------------------------------------------- kills


def strike(folder: Path, number: int, blow: Callable[[], None]) -> list[str]:
    """Call `blow` just before this process's `number`-th change of the disk below `folder` (from 1): a folder made, a
    file opened for writing, a block written, fsync, rename, removal. Returns the list of changes so far."""
    seen: list[str] = []

    def note(event: str) -> None:
        seen.append(event)
        if len(seen) == number:
            blow()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            if arguments[0].startswith(str(folder)):
                note(f"open {arguments[0]}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            note(f"{event} {arguments[0]}")

    sys.addaudithook(audit)
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        note("fsync")
        real_fsync(descriptor)

    os.fsync = fsync
    after_each_block(lambda: note("write"))
    return seen


def after_each_block(work: Callable[[], None]) -> None:
    """From now on, call `work` after each 16 KiB written to a file of tensors."""
    real = hashlib.sha256

    def digest() -> SimpleNamespace:
        inner = real()

        def update(block: bytes) -> None:
            work()
            inner.update(block)

        return SimpleNamespace(update=update, hexdigest=inner.hexdigest)

    tensor_files.BLOCK_BYTES = 1 << 14
    tensor_files.hashlib = SimpleNamespace(sha256=digest)  # type: ignore[assignment]


def kill_self() -> None:
    """No handler runs, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


def kills(root: Path, asynchronous: str, stride: str) -> None:
    """Kill a save at every `stride`-th change of the disk that it makes, each in a copy of this process, and check what
    a run would go on with."""
    trained, again = Trained(), Trained()
    chosen: list[int] = []
    for number in range(1, 1000, int(stride)):
        folder = root / str(number) / "checkpoints"
        trained.fill(1)
        trained.saver(folder, False).save(1, {})
        trained.fill(2)
        child = os.fork()
        if child == 0:
            strike(folder, number, kill_self)
            saver = trained.saver(folder, asynchronous == "async", keep_last=1)
            saver.save(2, {})
            trained.fill(3)
            saver.wait()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        chosen.append(check(folder, again))
        if status == 0:
            break
    assert status == 0 and chosen == sorted(chosen) and {chosen[0], chosen[-1]} == {1, 2}, chosen
    print(json.dumps({"kills": len(chosen) - 1, "first": chosen.index(2)}))


def check(folder: Path, trained: Trained) -> int:
    """The step of the checkpoint that a new run chooses; it is whole, bit by bit."""
    remove_partials(folder)
    assert not list(folder.rglob(".partial-*"))
    newest = checkpoints.newest_intact(folder, trained.world)
    assert newest is not None and newest == checkpoints.list_checkpoints(folder)[0]
    trained.fill(0)
    step: int = checkpoints.load(newest, trained.model, trained.optimizer)["step"]
    for name, value in values(step).items():
        assert trained.tensors()[name].equal(value), name
    return step


def victim(root: Path, rank: str, number: str, asynchronous: str) -> None:
    """One of several processes is killed at the `number`-th change that it makes of the disk in its second save."""
    world = environment()
    with process_group(world):
        trained = Trained()
        saver = trained.saver(root, asynchronous == "async")
        trained.fill(1)
        saver.save(1, {})
        saver.wait()
        trained.fill(2)
        if world.rank == int(rank):
            strike(root, int(number), kill_self)
        saver.save(2, {})
        trained.fill(3)
        saver.wait()


# ------------------------------------------------------------------------------------------------- failures, signals


def fails(root: Path, rank: str) -> None:
    """The disk is full for one of the processes: all of them say so, at the same time."""
    world = environment()
    with process_group(world):
        trained = Trained()
        saver = trained.saver(root, True)
        if world.rank == int(rank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        saver.save(1, {})
        while not saver.failed:
            time.sleep(0.01)
        try:
            saver.wait()
        except UserError as error:
            (root.parent / f"error-{world.rank}").write_text(str(error))


def signals(root: Path, name: str, times: str) -> None:
    """A signal comes while a save is in flight that takes a second; `times`: how often."""
    trained = Trained()
    trained.fill(1)
    saver = trained.saver(root, True)
    after_each_block(lambda: time.sleep(0.5))
    for again in range(int(times)):
        threading.Timer(0.2 + 0.3 * again, os.kill, (os.getpid(), getattr(signal, name))).start()
    try:
        saver.save(1, {})
        time.sleep(60)
    finally:
        saver.close()


if __name__ == "__main__":
    setup_logging()
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
