"""What processes send each other in a step; the tests start it.

Arguments: a base model, a list of settings of [parallel] as JSON, and a file for the bytes by collective and dtype.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.sharded_memory import text_row
from vft.adapters.lora import initialise
from vft.adapters.targets import choose_trainable
from vft.config.run import LoraConfig, ParallelConfig
from vft.distributed.process_group import World, environment, make_mesh, process_group
from vft.models import build
from vft.models.pretrained import Pretrained
from vft.parallel.parallelize import materialise, parallelize
from vft.training.losses import cross_entropy

WHOLE = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1, "c10d::allreduce_": 0}
"""Collectives, and which of their arguments is the whole tensor, not a shard."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that go through collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and count if it is a collective."""
        if (name := func.name()) in WHOLE:
            tensors = args[WHOLE[name]]
            for tensor in tensors if isinstance(tensors, list | tuple) else [tensors]:
                self.bytes[f"{name.removeprefix('c10d::').strip('_')} {tensor.dtype}"] += tensor.nbytes
        elif name.startswith("c10d::"):
            self.bytes[name] += 1
        return func(*args, **(kwargs or {}))


def main(base: str, settings: str, output: str) -> None:
    """One row forward and backward for each of the settings."""
    world = environment()
    with process_group(world):
        found = [traffic(base, ParallelConfig.model_validate(each), world) for each in json.loads(settings)]
        if world.is_main:
            Path(output).write_text(json.dumps(found))


def traffic(base: str, parallel: ParallelConfig, world: World) -> dict[str, Any]:
    """Bytes by collective and dtype, sizes of the model, and frozen parameters that got a gradient."""
    model = build(Pretrained.open(base), torch.bfloat16)
    choose_trainable(model, LoraConfig(rank=4), ())
    sizes = {"trained": 0, "layers": 0, "ends": 0}
    for name, parameter in model.named_parameters():
        numbers = parameter.numel() + len(parameter) % 2 * parameter[0].numel()  # both shares have as many rows
        sizes["trained"] += numbers if parameter.requires_grad else 0
        if not name.startswith("visual."):
            sizes["layers" if ".layers." in name else "ends"] += numbers
    parallelize(model, make_mesh(world, parallel.shard), parallel, torch.bfloat16, world.device)
    materialise(model, world.device, parallel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    initialise(model, seed=0)
    row = text_row(model)
    with Traffic() as seen:
        cross_entropy(model, row).backward()
    frozen = [name for name, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
    return {"bytes": seen.bytes, "frozen with gradient": frozen, **sizes}


if __name__ == "__main__":
    main(*sys.argv[1:])
