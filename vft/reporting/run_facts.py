"""What a run is: the facts of `run.json`, and the table of what is trained."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from rich.table import Table
from torch import nn

from vft.adapters.targets import TrainableRow
from vft.distributed.process_group import World
from vft.models.quantization import true_shapes


def describe_device(device: torch.device) -> str:
    """The name of a GPU, or the number of threads on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def describe_run(world: World, samples: int, lengths: Sequence[int], archives: int) -> dict[str, Any]:
    """Facts for run.json and the first message: device, processes, data, software.

    `lengths`: tokens of each document. `archives`: tar files that are streamed.
    """
    facts: dict[str, Any] = {"device": describe_device(world.device), "processes": world.size}
    facts |= {name: count for name, count in (("samples", samples), ("documents", len(lengths))) if count}
    if lengths:
        facts["tokens"] = f"{sum(lengths):,} in an epoch; {min(lengths):,} to {max(lengths):,} in a document"
    facts |= {"archives": archives} if archives else {}
    software = [f"{name} {version(name)}" for name in ("vft", "torch", "transformers", "torchcodec")]
    kinds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "Python": platform.python_version()}
    software += [f"{name} {number}" for name, number in kinds.items() if number]
    facts["software"] = ", ".join([*software, f"{platform.system()} {platform.machine()}"])
    return {**facts, "started": datetime.now(UTC).isoformat(timespec="seconds")}


def trainable_table(rows: Sequence[TrainableRow], model: nn.Module) -> Table:
    """What is trained, with its share of all parameters."""
    total = sum(map(math.prod, true_shapes(model).values()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = Table(title=f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})")
    for column in ("what", "modules", "parameters", "first of them"):
        table.add_column(column, justify="right" if column in ("modules", "parameters") else "left")
    for row in rows:
        table.add_row(row.what, f"{row.modules:,}", f"{row.parameters:,}", row.example)
    return table
