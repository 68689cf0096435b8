"""Processes, devices and the few collectives that a step needs. One process needs no process group at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vft.common.errors import UserError
from vft.distributed.heartbeat import barrier, current
from vft.distributed.rendezvous import group_store, link_check, watched

T = TypeVar("T")

SILENCE_S, TIMEOUT_S = 60.0, 600.0
"""Where no `[parallel]` table says otherwise; `vft/config/run.py` has what they mean."""
BACKGROUND = timedelta(hours=1)
"""Time-out of what threads beside the loop wait for: others that write a large file."""
LATER_S = 30.0
"""By which a collective's own time-out comes after `TIMEOUT_S`: it ends a process, but can't say why."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of them, as torchrun's environment says."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


def environment() -> World:
    """This process's place, before any process group exists."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local_rank, device)


@contextmanager
def together(silence_s: float = SILENCE_S, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """All processes know of each other from here on (`hosts.watched`); the process group comes when data are ready."""
    world, device = environment(), "CPU"
    if world.device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            error = UserError(
                f"process {world.local_rank} of this host has no GPU, there are {torch.cuda.device_count()}; "
                "lower --nproc-per-node"
            )
            error.on_one_rank = True
            raise error
        torch.cuda.set_device(world.device)
        device = torch.cuda.get_device_name(world.device)
    with watched(world.rank, world.size, world.local_rank, device, silence_s, timeout_s):
        yield world


@contextmanager
def process_group(world: World, alone: bool = False) -> Iterator[None]:
    """The process group of a run: NCCL (RCCL on ROCm) for GPUs with gloo beside it, gloo alone on CPUs.

    It begins when all processes have come, and is tried out at once. After an error it is left as it is: taking it down
    could wait for a process that is gone. One process needs none, unless it is to have a mesh all the same: `alone`.
    """
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    with together():
        watch = current()
        if watch is None:
            with _group_of_one(backend) if alone else nullcontext():
                yield
            return
        watch.barrier()
        limit = timedelta(seconds=watch.timeout_s + LATER_S)
        with link_check(watch):
            dist.init_process_group(
                backend, store=group_store(watch), rank=world.rank, world_size=world.size, timeout=limit
            )
            for device in dict.fromkeys(("cpu", world.device.type)):  # in the same order everywhere
                dist.all_reduce(one := torch.ones((), device=device))
                if int(one) != world.size:
                    raise RuntimeError(f"it gave {int(one)} for {world.size} processes")
        yield
        watch.barrier()
        dist.barrier()  # nobody leaves, and takes the store away, before all have met
        dist.destroy_process_group()


@contextmanager
def _group_of_one(backend: str) -> Iterator[None]:
    # Without others there is nobody to find through torchrun's store, which may not be there.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_mesh(world: World, shard: int) -> DeviceMesh | None:
    """The (replicate, shard) mesh; None where there is no process group. `shard` = 0 means all processes.

    UserError where `shard` doesn't divide the number of processes.
    """
    shard = shard or world.size
    if world.size % shard:
        raise UserError(
            f"parallel.shard = {shard}: doesn't divide the number of processes, {world.size}; use a divisor or 0"
        )
    if not dist.is_initialized():
        return None
    return init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("replicate", "shard"))


@dataclass(frozen=True, slots=True)
class DataParallel:
    """The part of the data that this process works on: number `rank` of `size`.

    Packs, questions and gradients are divided by it, never by the number of processes: those that differ in another
    axis of the mesh alone work on the same part.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    """The processes that have one part each; None: all processes."""

    AXES: ClassVar = ("replicate", "shard")

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> DataParallel:
        """By the axes of the mesh that divide the data; without a mesh, which means one process, all of it."""
        if mesh is None:
            return cls()
        data = mesh[cls.AXES]
        rank = 0
        for axis in cls.AXES:
            rank = rank * data[axis].size() + data.get_local_rank(axis)
        group = None if data.size() == dist.get_world_size() else data._flatten("data").get_group()
        return cls(rank, data.size(), group)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all parts, in place."""
        if dist.is_initialized():
            dist.all_reduce(values, group=self.group)
        return values


def place() -> tuple[int, int]:
    """This process's rank in the process group, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast(values: Tensor, source: int) -> Tensor:
    """What process `source` has in `values`, in place."""
    if dist.is_initialized():
        dist.broadcast(values, source)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Elementwise sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest of all processes' values."""
    if not dist.is_initialized():
        return value
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def all_of(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    barrier()  # one of them may still be writing or reading what it is asked about
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def background_group() -> dist.ProcessGroup | None:
    """All processes once more, for threads beside the loop: its collectives may cross those of the loop. Every process
    calls it."""
    return dist.new_group(backend="gloo", timeout=BACKGROUND) if dist.is_initialized() else None


def same_on_all_ranks(what: str, digest: str) -> None:
    """UserError where `digest` (of a configuration, an index) differs between processes."""
    digests = all_of(digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise UserError(f"{what} differs between processes: {digests[0]} on rank 0, {other} on rank {rank}")


def local_rows(parameter: Tensor) -> slice:
    """The rows (of the first axis) of the whole tensor that this process holds."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return slice(offset[0], offset[0] + shape[0]) if shape[0] else slice(0, 0)


def writes_rows(tensor: Tensor) -> bool:
    """Whether this process is the one to write the rows that it holds, if any: the first of all replicas, and rank 0
    where a tensor isn't sharded."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    place = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
    return tensor.to_local().numel() > 0 and all(at == 0 for at, how in place if how.is_replicate())


def sharded_like(tensor: Tensor, rows: Tensor) -> Tensor:
    """This process's `rows` [r, n] as a part of a whole that is sharded as `tensor` is; themselves where it isn't."""
    if not isinstance(tensor, DTensor):
        return rows
    shape = torch.Size((tensor.shape[0], rows.shape[1]))
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=(shape[1], 1)
    )


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor behind a sharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
