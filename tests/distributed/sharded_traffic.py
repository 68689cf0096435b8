"""What processes send each other in a step; the tests start it. Arguments: a base model, settings of [parallel] as
JSON, a file for bytes by collective and type."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.sharded_memory import text_row
from vft.adapters.init import initialise
from vft.adapters.targets import choose_trainable
from vft.config.run import LoraConfig, ParallelConfig
from vft.distributed.process_group import environment, make_mesh, process_group
from vft.models import build
from vft.models.pretrained import Pretrained
from vft.parallel.parallelize import materialise, parallelize
from vft.training.losses import cross_entropy

WHOLE = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1, "c10d::allreduce_": 0}
"""Collectives, and which of their arguments is not a share but all."""


class Traffic(TorchDispatchMode):
    """Bytes that go through collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and count."""
        if (name := func.name()) in WHOLE:
            tensors = args[WHOLE[name]]
            for tensor in tensors if isinstance(tensors, list | tuple) else [tensors]:
                self.bytes[f"{name.removeprefix('c10d::').strip('_')} {tensor.dtype}"] += tensor.nbytes
        elif name.startswith("c10d::"):
            self.bytes[name] += 1
        return func(*args, **(kwargs or {}))


def main(base: str, settings: str, output: str) -> None:
    """One row forwards and backwards."""
    world = environment()
    model = build(Pretrained.open(base), torch.bfloat16)
    parallel = ParallelConfig.model_validate_json(settings)
    choose_trainable(model, LoraConfig(rank=4), ())
    sizes = {"trained": 0, "layers": 0, "ends": 0}
    for name, parameter in model.named_parameters():
        numbers = parameter.numel() + len(parameter) % 2 * parameter[0].numel()  # both shares have as many rows
        sizes["trained"] += numbers if parameter.requires_grad else 0
        if not name.startswith("visual."):
            sizes["layers" if ".layers." in name else "ends"] += numbers
    with process_group(world):
        parallelize(model, make_mesh(world, parallel.shard), parallel, torch.bfloat16, world.device)
        materialise(model, world.device, parallel)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.02)
        initialise(model, seed=0)
        row = text_row(model)
        with Traffic() as seen:
            cross_entropy(model, row).backward()
        frozen = [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
        if world.is_main:
            Path(output).write_text(json.dumps({"bytes": seen.bytes, "frozen with gradient": frozen, **sizes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
