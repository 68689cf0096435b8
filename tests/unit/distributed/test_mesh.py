"""The mesh of processes, and which part of the data each of them works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed import fake_pg  # registers the backend "fake"

from vft.common.errors import UserError
from vft.distributed.process_group import DataParallel, World, make_mesh


@contextmanager
def process(rank: int, size: int) -> Iterator[World]:
    """Process `rank` of `size`, with a group whose collectives do nothing."""
    store: Any = fake_pg.FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, rank, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("shard", [0, 1, 2, 4])
def test_every_process_has_a_part_of_its_own(shard: int) -> None:
    for rank in range(4):
        with process(rank, 4) as world:
            mesh = make_mesh(world, shard)
            assert mesh is not None and mesh.shape == (4 // (shard or 4), shard or 4)
            assert DataParallel.of(mesh) == DataParallel(rank, 4)


def test_another_axis_does_not_divide_the_data() -> None:
    ranks = []
    for rank in range(8):
        with process(rank, 8):
            parts = DataParallel.of(init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "shard", "tensor")))
            assert parts.size == 4 and parts.group is not None
            assert dist.get_process_group_ranks(parts.group) == [rank % 2 + 2 * i for i in range(4)]
            ranks.append(parts.rank)
    assert ranks == [0, 0, 1, 1, 2, 2, 3, 3]


def test_one_process_has_all_of_it() -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    assert make_mesh(world, 0) is None and DataParallel.of(None) == DataParallel(0, 1)
    assert DataParallel.of(None).sum(torch.tensor([1, 2])).tolist() == [1, 2]


def test_shard_must_divide_the_number_of_processes() -> None:
    with pytest.raises(UserError, match=r"parallel\.shard = 3: doesn't divide the number of processes, 4"):
        make_mesh(World(0, 4, 0, torch.device("cpu")), 3)
