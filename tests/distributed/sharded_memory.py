"""Memory of a sharded step: counted beforehand for a group that is not there, and as torch's allocator gives it out.

python -m tests.distributed.sharded_memory planned|real BASE MODE QUANTIZE OUTPUT
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers.allocations import allocated_peak
from vft.adapters.lora import initialise
from vft.adapters.targets import choose_trainable
from vft.common.types import IGNORE_INDEX, Batch, Document
from vft.config.run import LoraConfig, ParallelConfig
from vft.data.packing import collate
from vft.distributed.process_group import World, environment, make_mesh, process_group
from vft.models import build
from vft.models.base import VideoLanguageModel
from vft.models.pretrained import Pretrained
from vft.models.quantization import is_packed
from vft.parallel.parallelize import checkpoint_activations, parallelize
from vft.preparation.memory import run_step
from vft.training.losses import cross_entropy

TOKENS = 600


def main(kind: str, base: str, mode: str, quantize: str, output: str) -> None:
    """Write the peak of one step, beside what stays, in bytes."""
    model = build(Pretrained.open(base), torch.float32, quantize)
    choose_trainable(model, LoraConfig(rank=4), ())
    row = text_row(model)
    if kind == "planned":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        checkpoint_activations(model, mode)
        mesh = make_mesh(World(0, 2, 0, torch.device("cpu")), 0)
        live = run_step(model, cross_entropy, row, torch.device("cpu"), mesh)
        Path(output).write_text(json.dumps({"peak": live.peak, "gathered": live.gathered_at_peak}))
        return
    world = environment()
    with process_group(world):
        config = ParallelConfig(activation_checkpointing=mode)  # type: ignore[arg-type]
        parallelize(model, make_mesh(world, 0), config, torch.float32, world.device)
        model.to_empty(device=world.device)
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter) if is_packed(parameter) else torch.nn.init.normal_(parameter, 0, 0.02)
        initialise(model, seed=0)
        peak = allocated_peak(lambda: cross_entropy(model, row).backward())
        if world.is_main:
            Path(output).write_text(json.dumps({"peak": peak}))


def text_row(model: VideoLanguageModel) -> Batch:
    """One document of text."""
    ids = torch.arange(TOKENS) % 50
    labels = torch.where(torch.arange(TOKENS) >= TOKENS // 2, ids, IGNORE_INDEX)
    positions_3T = torch.arange(TOKENS).expand(3, -1).contiguous()
    mask_T = torch.zeros(math.prod(ids.shape), dtype=torch.bool)
    document = Document(("text",), ids, labels, positions_3T, 0, (TOKENS,), (), mask_T)
    return collate([(document, [])], model.processor)


if __name__ == "__main__":
    main(*sys.argv[1:])
