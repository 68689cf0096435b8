"""Processes, devices, the mesh, and the few collectives that a step needs. One process needs no process group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vft.common.errors import UserError
from vft.distributed.heartbeat import barrier, current
from vft.distributed.rendezvous import connected, link_check

T = TypeVar("T")

SILENCE_S, TIMEOUT_S = 60.0, 600.0
"""Defaults of `parallel.silence_s` and `parallel.timeout_s` (`vft/config/run.py`)."""
BACKGROUND = timedelta(hours=1)
"""Timeout of the collectives of background threads, which wait for others to write large files."""
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
LATER_S = 30.0
"""A collective's own timeout comes this much later than `timeout_s`: it ends a process, but can't say why."""


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among all processes, from the environment that torchrun sets."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows messages."""
        return self.rank == 0


def environment() -> World:
    """The place of this process. Needs no process group."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), local_rank, device)


def local_world_size() -> int:
    """How many processes of the run are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def together(silence_s: float = SILENCE_S, timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Connect all processes and start their heartbeats (`rendezvous.connected`).

    The process group is made later, when the data are ready. Raises UserError if this process has no GPU.
    """
    world = environment()
    if world.device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {world.local_rank} of this host has no GPU, there are {torch.cuda.device_count()}; "
                "lower --nproc-per-node",
                on_one_rank=True,
            )
        torch.cuda.set_device(world.device)
        set_allocator()
    with connected(world.rank, world.size, world.local_rank, silence_s, timeout_s):
        yield world


def set_allocator() -> None:
    """Settings of torch's allocators, unless the environment has its own.

    Rows differ in length: segments that grow leave fewer holes than segments of fixed sizes. Pinned blocks above 1 MiB
    are not rounded up to a power of two, which could double the host memory of checkpoints and offloaded weights.
    """
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    expandable = "expandable_segments:True"
    for settings in (f"{expandable},pinned_max_round_threshold_mb:1", expandable):  # older versions lack the second
        with suppress(RuntimeError, ValueError, AttributeError):
            torch._C._accelerator_setAllocatorSettings(settings)
            return


@contextmanager
def process_group(world: World, alone: bool = False) -> Iterator[None]:
    """The process group of a run: NCCL (RCCL on ROCm) and gloo on GPUs, gloo alone on CPUs.

    It is made when all processes are here, and tested with a sum. After an error it is not destroyed, since that could
    wait for a process that is gone. A single process gets a group only if `alone` says so: it then has a mesh, too.
    """
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    with together():
        heartbeat = current()
        if heartbeat is None:
            try:
                if alone:  # a store in memory: torchrun's may not exist
                    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
                yield
            finally:
                if alone:
                    dist.destroy_process_group()
            return
        heartbeat.barrier()
        limit = timedelta(seconds=heartbeat.timeout_s + LATER_S)
        # With a connection of its own: an operation of one thread holds up those of others.
        store = dist.PrefixStore("group", heartbeat.store.clone())  # type: ignore[attr-defined]
        with link_check(heartbeat):
            dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
            for device in dict.fromkeys(("cpu", world.device.type)):  # in the same order everywhere
                dist.all_reduce(one := torch.ones((), device=device))
                if int(one) != world.size:
                    raise RuntimeError(f"it gave {int(one)} for {world.size} processes")
        yield
        heartbeat.barrier()
        dist.barrier()  # rank 0 must not leave, and end the store, before all have been here
        dist.destroy_process_group()


def make_mesh(world: World, shard: int) -> DeviceMesh | None:
    """The (replicate, shard) mesh, or None without a process group. `shard` = 0 means all processes.

    Raises UserError if `shard` does not divide the number of processes.
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

    @classmethod
    def of(cls, mesh: DeviceMesh | None) -> DataParallel:
        """By the axes of the mesh that divide the data; without a mesh, which means one process, all of it."""
        if mesh is None:
            return cls()
        data = mesh["replicate", "shard"]._flatten("data")
        group = None if data.size() == dist.get_world_size() else data.get_group()
        return cls(data.get_local_rank(), data.size(), group)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all parts, in place."""
        return sum_over_ranks(values, self.group)


def place() -> tuple[int, int]:
    """Rank of this process in the process group, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast(values: Tensor, source: int) -> Tensor:
    """Overwrite `values` with those of process `source`."""
    if dist.is_initialized():
        dist.broadcast(values, source)
    return values


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Elementwise sum over all processes, or those of `group`, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, group=group)
    return values


def largest_over_ranks(value: int) -> int:
    """The largest value of all processes."""
    if not dist.is_initialized():
        return value
    values = torch.tensor(value)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def all_of(value: T, group: dist.ProcessGroup | None = None, wait: bool = True) -> list[T]:
    """The values of all processes, by rank. They are pickled: for small objects.

    A process may still be reading or writing a large file, so that this waits for it without a timeout. A background
    thread may not `wait` so, since it would meet the main threads of others; its group has a long timeout.
    """
    if not dist.is_initialized():
        return [value]
    if wait:
        barrier()
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def background_group() -> dist.ProcessGroup | None:
    """A second group of all processes, for background threads, whose collectives run beside those of the loop.

    Every process must call it.
    """
    return dist.new_group(backend="gloo", timeout=BACKGROUND) if dist.is_initialized() else None


def same_on_all_ranks(what: str, digest: str) -> None:
    """Raise UserError if `digest` (of a configuration or an index) differs between processes."""
    digests = all_of(digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise UserError(f"{what} differs between processes: {digests[0]} on rank 0, {other} on rank {rank}")


def local_rows(parameter: Tensor) -> slice:
    """Which rows (of the first axis) of a sharded tensor this process holds; all, if it is not sharded."""
    if not isinstance(parameter, DTensor):
        return slice(None)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return slice(offset[0], offset[0] + shape[0]) if shape[0] else slice(0, 0)


def writes_rows(tensor: Tensor) -> bool:
    """Whether this process writes the rows that it holds: of all replicas the first, and rank 0 for a tensor that is
    not sharded."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    place = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
    return tensor.to_local().numel() > 0 and all(at == 0 for at, how in place if how.is_replicate())


def sharded_like(tensor: Tensor, rows: Tensor) -> Tensor:
    """A tensor sharded as `tensor` is, of which this process holds `rows` [r, n]; `rows` if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return rows
    shape = torch.Size((tensor.shape[0], rows.shape[1]))
    return DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=(shape[1], 1)
    )


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (a collective); the tensor itself if it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
