"""Processes, devices and the few collectives that a step needs. One process needs no process group at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vft.types import UserError

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""Of a collective: others wait in one while the first process writes or verifies a large checkpoint."""


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
def process_group(world: World, alone: bool = False) -> Iterator[None]:
    """The process group of a run: NCCL (RCCL on ROCm) for GPUs with gloo beside it, gloo alone on CPUs.

    One process needs none, unless it is to have a mesh all the same: `alone`.
    """
    if world.device.type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {world.local_rank} of this host has no GPU, there are {torch.cuda.device_count()}; "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(world.device)
    if world.size == 1 and not alone:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    if world.size > 1:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:  # there is nobody to find through torchrun's store, which may not be there
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=0, world_size=1)
    try:
        yield
        dist.barrier()
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


def all_of(value: T) -> list[T]:
    """Every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor behind a sharded one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (a collective), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
